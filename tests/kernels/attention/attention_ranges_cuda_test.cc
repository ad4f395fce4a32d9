// Dense attention of ranges of queries on a GPU.
#include "tests/kernels/attention/attention_cuda_ranges.h"

namespace sala::kernels {
namespace {

class AttentionRangesCuda : public CudaKernelTest {
 protected:
  void Run(AttentionCase& part, const std::vector<DocumentRange>& documents, int64_t first_query,
           DType gradients = DType::kF32) {
    const DeviceRange x(part, gradients);
    AttentionForward(ctx(), x.q(), x.k(), x.v(), documents, part.scale(), x.out(), x.lse(),
                     first_query);
    AttentionBackward(ctx(), x.q(), x.k(), x.v(), x.out(), x.lse(), x.dout(), documents,
                      part.scale(), x.dq(), x.dk(), x.dv(), first_query);
    x.Download(part);
  }
  static AttentionCase NewCase(int64_t tokens, const HeadCounts& heads, unsigned seed = 1) {
    AttentionCase c(tokens, heads, seed);
    RoundInputs(c);
    return c;
  }
  // Rows of all ranges have the bits of one call; dk and dv add up to the reference's.
  void ExpectRangesGiveTheWhole(AttentionCase& whole, const std::vector<DocumentRange>& documents,
                                const std::vector<DocumentRange>& ranges) {
    SCOPED_TRACE("documents" + TextOf(documents) + ", ranges" + TextOf(ranges));
    PoisonUnused(whole, Used(whole.t, documents));
    Run(whole, documents, 0);
    JoinedRanges joined(whole);
    for (const DocumentRange& range : ranges) {
      AttentionCase part = QueriesIn(whole, range);
      Run(part, documents, range.begin);
      joined.Add(part, range, documents);
    }
    const AttentionCase& results = joined.Results();
    ExpectSameRows(results, whole);
    for (const DocumentRange& document : documents) {
      ExpectMatchesReferenceInBf16(DocumentOf(whole, results, document));
    }
  }
};

TEST_F(AttentionRangesCuda, RandomRangesGiveTheWhole) {
  std::mt19937 rng(21);
  const unsigned trials = kSlowBuild ? 2 : 8;
  for (unsigned i = 0; i < trials; ++i) {
    const HeadCounts heads = i % 2 == 0 ? HeadCounts{2, 1, 16} : HeadCounts{2, 2, 32};
    AttentionCase whole = NewCase((kSlowBuild ? 150 : 280) + i, heads, i);
    const auto documents = RandomDocuments(whole.t, i % 2 == 0 ? 300 : 120, rng);
    ExpectRangesGiveTheWhole(whole, documents, RandomRanges(whole.t, rng));
    if (HasFailure()) return;
  }
}

// Borders of warps (16 tokens), tiles of keys (64) and of queries (128), and beside them.
TEST_F(AttentionRangesCuda, BordersOfTiles) {
  const std::vector<std::vector<int64_t>> all = {
      {64, 128}, {0, 63, 63, 65, 200}, {15, 16, 17}, {129, 250}};
  for (const auto& borders : all) {
    if (kSlowBuild && borders.size() != 3) continue;
    AttentionCase whole = NewCase(260, {1, 1, 16});
    ExpectRangesGiveTheWhole(whole, {{0, 210}, {210, 260}}, RangesOf(borders, whole.t));
  }
}

TEST_F(AttentionRangesCuda, HeadsOfTheReleasedModel) {
  AttentionCase whole = NewCase(kSlowBuild ? 40 : 100, {16, 1, 128});
  ExpectRangesGiveTheWhole(whole, {{0, whole.t}}, RangesOf({21, 37}, whole.t));
}

// 64 heads to a key/value head: more than 512 queries come in pieces, also behind a border.
TEST_F(AttentionRangesCuda, SumsOfKeysInPieces) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  const AttentionCase whole = NewCase(570, {64, 1, 16});
  AttentionCase part = QueriesIn(whole, {37, whole.t});
  AttentionCase rounded = part;
  Run(part, {{0, whole.t}}, 37);
  Run(rounded, {{0, whole.t}}, 37, DType::kBF16);
  ExpectSameRows(part, rounded);
  ExpectRounded(rounded, part);
  // The first queries, all others: with the reference for all.
  AttentionCase first = QueriesIn(whole, {0, 37});
  Run(first, {{0, whole.t}}, 0);
  JoinedRanges joined(whole);
  joined.Add(first, {0, 37}, {{0, whole.t}});
  joined.Add(part, {37, whole.t}, {{0, whole.t}});
  ExpectSampleMatchesReference(joined.Results(), reference::AttendsAll, {0, 36, 37, 511, 512, 569},
                               {0, 36, 37, 63, 64, 300, 512, 569});
}

TEST_F(AttentionRangesCuda, GradientsInFloat32AreThoseBeforeRounding) {
  const auto documents = DocumentsOf({70, 1, 64, 3}, /*gap=*/3);
  AttentionCase f32 = NewCase(documents.back().end, {4, 2, 16});
  AttentionCase bf16 = f32;
  Run(f32, documents, 0);
  Run(bf16, documents, 0, DType::kBF16);
  ExpectSameRows(f32, bf16);
  ExpectRounded(bf16, f32);
  EXPECT_FALSE(bf16.dk.SameBits(f32.dk));
}

TEST_F(AttentionRangesCuda, NoQueriesGiveZeros) {
  const auto documents = DocumentsOf({70, 3}, /*gap=*/2);
  const AttentionCase whole = NewCase(documents.back().end + 1, {4, 2, 16});
  for (const int64_t first : {int64_t{0}, int64_t{30}, whole.t}) {
    for (const DType gradients : {DType::kF32, DType::kBF16}) {
      AttentionCase part = QueriesIn(whole, {first, first});
      Run(part, documents, first, gradients);
      ExpectNoKeyGradients(part, documents);
    }
  }
  AttentionCase none = QueriesIn(whole, {10, 20});
  Run(none, {}, 10);
  for (const Matrix* x : none.Results()) {
    for (const double value : x->values()) ASSERT_TRUE(std::isnan(value));
  }
}

using AttentionRangesCudaDeathTest = AttentionRangesCuda;

TEST_F(AttentionRangesCudaDeathTest, QueriesOutsideOfTheTokensAbort) {
  const AttentionCase whole = NewCase(6, {2, 1, 16});
  AttentionCase part = QueriesIn(whole, {0, 4});
  EXPECT_DEATH(Run(part, {{0, 6}}, 3), "4 queries from token 3 on, of 6 tokens");
}

}  // namespace
}  // namespace sala::kernels
