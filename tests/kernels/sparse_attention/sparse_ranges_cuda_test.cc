// Block selection and block-sparse attention of ranges of queries on a GPU.
#include "tests/kernels/attention/attention_cuda_ranges.h"
#include "tests/kernels/sparse_attention/sparse_case.h"

namespace sala::kernels {
namespace {

class SparseRangesCuda : public CudaKernelTest {
 protected:
  static SparseCase NewCase(int64_t tokens, const HeadCounts& heads,
                            const SparseAttentionConfig& config, unsigned seed = 1) {
    SparseCase c(tokens, heads, config, seed);
    RoundInputs(c);
    return c;
  }
  static SparseCase Range(const SparseCase& whole, const DocumentRange& range) {
    SparseCase part = QueriesIn(whole, range);
    const auto row = whole.heads.kv * whole.width();
    part.chosen.assign(whole.chosen.begin() + range.begin * row,
                       whole.chosen.begin() + range.end * row);
    return part;
  }
  // The device's choice, in a buffer of exactly that size.
  void Select(SparseCase& part, const std::vector<DocumentRange>& documents, int64_t first_query) {
    const DeviceRange x(part, DType::kF32);
    std::fill(part.chosen.begin(), part.chosen.end(), SparseCase::kPoison);
    const DeviceIntegers device(part.chosen);
    void* data = const_cast<void*>(device.tensor().raw());
    SelectBlocks(
        ctx(), x.q(), x.k(), documents, part.config, part.scale(),
        Tensor(data, DType::kI32, {part.q.rows(), part.heads.kv, part.width()}, DeviceKind::kCuda),
        first_query);
    TestDevice().Download(part.chosen.data(), data, part.chosen.size() * sizeof(int32_t));
  }
  // With the blocks of the case.
  void Attend(SparseCase& part, const std::vector<DocumentRange>& documents, int64_t first_query,
              DType gradients = DType::kF32) {
    const DeviceRange x(part, gradients);
    const DeviceIntegers chosen(part.chosen);
    const ConstTensor blocks =
        chosen.tensor().Reshape({part.q.rows(), part.heads.kv, part.width()});
    SparseAttentionForward(ctx(), x.q(), x.k(), x.v(), documents, part.config, part.scale(), blocks,
                           x.out(), x.lse(), first_query);
    SparseAttentionBackward(ctx(), x.q(), x.k(), x.v(), x.out(), x.lse(), x.dout(), documents,
                            part.config, part.scale(), blocks, x.dq(), x.dk(), x.dv(), first_query);
    x.Download(part);
  }
  // Blocks and rows of all ranges have the bits of one call. Returns the joined results.
  AttentionCase RunRanges(SparseCase& whole, const std::vector<DocumentRange>& documents,
                          const std::vector<DocumentRange>& ranges) {
    Select(whole, documents, 0);
    Attend(whole, documents, 0);
    JoinedRanges joined(whole);
    for (const DocumentRange& range : ranges) {
      const SparseCase expected = Range(whole, range);
      SparseCase part = expected;
      Select(part, documents, range.begin);
      EXPECT_EQ(part.chosen, expected.chosen) << "range at " << range.begin;
      Attend(part, documents, range.begin);
      joined.Add(part, range, documents);
    }
    ExpectSameRows(joined.Results(), whole);
    return joined.Results();
  }
  static SparseCase DocumentWithBlocks(const SparseCase& whole, const AttentionCase& results,
                                       const DocumentRange& document) {
    SparseCase piece = DocumentOf(whole, results, document);
    piece.chosen = Range(whole, document).chosen;
    return piece;
  }
};

TEST_F(SparseRangesCuda, RandomRangesGiveTheWhole) {
  std::mt19937 rng(22);
  const unsigned trials = kSlowBuild ? 2 : 8;
  for (unsigned i = 0; i < trials; ++i) {
    const HeadCounts heads = i % 2 == 0 ? HeadCounts{2, 1, 16} : HeadCounts{4, 2, 16};
    SparseCase whole = NewCase((kSlowBuild ? 160 : 260) + i, heads, SmallConfig(), i);
    const auto documents = RandomDocuments(whole.t, i % 2 == 0 ? 330 : 200, rng);
    const auto ranges = RandomRanges(whole.t, rng);
    SCOPED_TRACE("documents" + TextOf(documents) + ", ranges" + TextOf(ranges));
    PoisonUnused(whole, Used(whole.t, documents));
    const AttentionCase results = RunRanges(whole, documents, ranges);
    for (const DocumentRange& document : documents) {
      const SparseCase piece = DocumentWithBlocks(whole, results, document);
      ExpectMatchesReferenceInBf16(piece, piece.SeenKeys());
    }
    if (HasFailure()) return;
  }
}

// Borders of tiles (8 tokens) and blocks (16), and beside them.
TEST_F(SparseRangesCuda, BordersOfBlocks) {
  const std::vector<std::vector<int64_t>> all = {
      {16, 112, 128, 176}, {0, 15, 113, 113, 200}, {8, 9, 119, 121}};
  for (const auto& borders : all) {
    if (kSlowBuild && borders.size() != 5) continue;
    SparseCase whole = NewCase(200, {2, 1, 16}, SmallConfig());
    const AttentionCase results = RunRanges(whole, {{0, 200}}, RangesOf(borders, whole.t));
    ExpectMatchesReferenceInBf16(DocumentWithBlocks(whole, results, {0, 200}), whole.SeenKeys());
  }
}

// The released numbers of blocks in blocks of a quarter of the size: a block is left out from 1,536
// tokens on.
TEST_F(SparseRangesCuda, ReleasedBlockNumbersInSmallBlocks) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  SparseAttentionConfig config = SmallConfig();
  config.window_size = 512;
  config.topk = 64;
  SparseCase whole = NewCase(1700, {1, 1, 16}, config);
  const AttentionCase results =
      RunRanges(whole, {{0, 60}, {60, 1700}}, RangesOf({700, 701, 1599}, whole.t));
  const SparseCase piece = DocumentWithBlocks(whole, results, {60, 1700});
  ExpectSampleMatchesReference(piece, piece.SeenKeys(), {0, 639, 640, 641, 1538, 1539, 1639},
                               {0, 15, 16, 639, 640, 900, 1100, 1538, 1539, 1639});
}

// A block that more than 8,192 queries of a range attend to, and one that all of them chose.
TEST_F(SparseRangesCuda, LongListsInPieces) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  SparseCase whole = NewCase(8700, {1, 1, 16}, SmallConfig());
  for (int64_t t = 0; t < whole.t; ++t) {
    int32_t* row = whole.chosen.data() + t * whole.width();
    const int64_t last = t / 16 - 2;  // candidates 1 .. last - 1
    std::fill_n(row, whole.width(), kNoBlock);
    if (last > 1) row[0] = 1;
    if (last > 3) row[1] = static_cast<int32_t>(2 + t * 7 % (last - 2));
  }
  JoinedRanges joined(whole);
  for (const DocumentRange& range : RangesOf({100, 8500}, whole.t)) {
    SparseCase part = Range(whole, range);
    Attend(part, {{0, whole.t}}, range.begin);
    joined.Add(part, range, {{0, whole.t}});
  }
  ExpectSampleMatchesReference(joined.Results(), whole.SeenKeys(),
                               {0, 47, 48, 99, 100, 4000, 8292, 8499, 8500, 8699},
                               {0, 15, 16, 31, 32, 99, 100, 4000, 8499, 8699});
}

TEST_F(SparseRangesCuda, GradientsInFloat32AreThoseBeforeRounding) {
  SparseCase f32 = NewCase(150, {4, 2, 16}, SmallConfig());
  Select(f32, {{0, 150}}, 0);
  SparseCase bf16 = f32;
  Attend(f32, {{0, 150}}, 0);
  Attend(bf16, {{0, 150}}, 0, DType::kBF16);
  ExpectSameRows(f32, bf16);
  ExpectRounded(bf16, f32);
  EXPECT_FALSE(bf16.dk.SameBits(f32.dk));
}

TEST_F(SparseRangesCuda, NoQueriesGiveZeros) {
  const SparseCase whole = NewCase(200, {4, 2, 16}, SmallConfig());
  const std::vector<DocumentRange> documents = {{10, 150}, {150, 200}};
  for (const int64_t first : {int64_t{0}, int64_t{130}, int64_t{200}}) {
    SparseCase part = Range(whole, {first, first});
    Select(part, documents, first);
    Attend(part, documents, first);
    ExpectNoKeyGradients(part, documents);
  }
  SparseCase none = Range(whole, {130, 140});
  Select(none, {}, 130);
  Attend(none, {}, 130);
  for (const Matrix* x : none.Results()) {
    for (const double value : x->values()) ASSERT_TRUE(std::isnan(value));
  }
}

using SparseRangesCudaDeathTest = SparseRangesCuda;

TEST_F(SparseRangesCudaDeathTest, QueriesOutsideOfTheTokensAbort) {
  const SparseCase whole = NewCase(6, {2, 1, 16}, SmallConfig());
  SparseCase part = Range(whole, {0, 4});
  EXPECT_DEATH(Select(part, {{0, 6}}, 3), "4 queries from token 3 on, of 6 tokens");
}

}  // namespace
}  // namespace sala::kernels
