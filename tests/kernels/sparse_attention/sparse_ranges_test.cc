// Block-sparse attention of ranges of queries on the CPU.
#include "tests/kernels/attention/attention_ranges.h"
#include "tests/kernels/sparse_attention/sparse_case.h"

namespace sala::kernels {
namespace {

SparseCase Range(const SparseCase& whole, const DocumentRange& range) {
  SparseCase part = QueriesIn(whole, range);
  part.chosen.assign(static_cast<size_t>(range.length() * whole.heads.kv * whole.width()),
                     SparseCase::kPoison);
  return part;
}

// The blocks of a range are those of its tokens in the whole.
void ExpectSameBlocks(const SparseCase& part, const SparseCase& whole, const DocumentRange& range) {
  const auto row = whole.heads.kv * whole.width();
  EXPECT_TRUE(
      std::equal(part.chosen.begin(), part.chosen.end(), whole.chosen.begin() + range.begin * row))
      << "range at " << range.begin;
}

// The joined results of the ranges, whose rows have the bits of the whole.
AttentionCase RunRanges(const Context& ctx, SparseCase& whole,
                        const std::vector<DocumentRange>& documents,
                        const std::vector<DocumentRange>& ranges) {
  whole.Run(ctx, documents);
  JoinedRanges joined(whole);
  for (const DocumentRange& range : ranges) {
    SparseCase part = Range(whole, range);
    part.Run(ctx, documents, range.begin);
    ExpectSameBlocks(part, whole, range);
    joined.Add(part, range, documents);
  }
  ExpectSameRows(joined.Results(), whole);
  return joined.Results();
}

// Rows of `chosen` of one document.
SparseCase DocumentWithBlocks(const SparseCase& whole, const AttentionCase& results,
                              const DocumentRange& document) {
  SparseCase piece = DocumentOf(whole, results, document);
  const auto row = whole.heads.kv * whole.width();
  piece.chosen.assign(whole.chosen.begin() + document.begin * row,
                      whole.chosen.begin() + document.end * row);
  return piece;
}

TEST(SparseRanges, RandomRangesGiveTheWhole) {
  KernelTest kernel(2);
  std::mt19937 rng(12);
  for (unsigned i = 0; i < 16; ++i) {
    const HeadCounts heads = i % 2 == 0 ? HeadCounts{4, 2, 16} : HeadCounts{16, 1, 8};
    SparseCase whole(300 + i, heads, SmallConfig(), i);
    const auto documents = RandomDocuments(whole.t, i % 3 == 0 ? 330 : 200, rng);
    const auto ranges = RandomRanges(whole.t, rng);
    SCOPED_TRACE("documents" + TextOf(documents) + ", ranges" + TextOf(ranges));
    PoisonUnused(whole, Used(whole.t, documents));
    const AttentionCase results = RunRanges(kernel.ctx(), whole, documents, ranges);
    for (const DocumentRange& document : documents) {
      const SparseCase piece = DocumentWithBlocks(whole, results, document);
      ExpectMatchesReference(piece, piece.SeenKeys());
    }
    if (testing::Test::HasFailure()) return;
    EXPECT_EQ(kernel.arena().used_bytes(), 0U);
  }
}

TEST(SparseRanges, BordersOfBlocks) {
  KernelTest kernel;
  for (const auto& borders :
       {std::vector<int64_t>{16, 112, 128, 256}, {0, 15, 113, 113, 300}, {1, 110, 111, 299}}) {
    SparseCase whole(300, {4, 2, 8}, SmallConfig());
    const AttentionCase results =
        RunRanges(kernel.ctx(), whole, {{0, 300}}, RangesOf(borders, whole.t));
    ExpectMatchesReference(DocumentWithBlocks(whole, results, {0, 300}), whole.SeenKeys());
  }
}

// The released model's block numbers, past the budget, with a document before. The reference is
// quadratic: gradients by sample.
TEST(SparseRanges, ReleasedBlockNumbers) {
  KernelTest kernel(2);
#ifdef SALA_SANITIZED  // many times slower: as short as leaves a block out
  constexpr int64_t kTokens = 6145;
#else
  constexpr int64_t kTokens = 6500;
#endif
  SparseCase whole(100 + kTokens, {2, 1, 16}, SparseAttentionConfig());
  const AttentionCase results = RunRanges(kernel.ctx(), whole, {{0, 100}, {100, 100 + kTokens}},
                                          RangesOf({50, 3000, 3100 + 64, 100 + 6143}, whole.t));
  const SparseCase piece = DocumentWithBlocks(whole, results, {100, 100 + kTokens});
  const RowsOfReference expected(piece, piece.SeenKeys());
  for (const int64_t t : RowSample(kTokens)) {
    expected.ExpectQuery(piece, t);
    expected.ExpectKey(piece, t);
    if (HasFatalFailure()) return;
  }
}

TEST(SparseRanges, NoQueriesGiveZeros) {
  KernelTest kernel;
  const SparseCase whole(200, {4, 2, 8}, SmallConfig());
  SparseCase part = Range(whole, {130, 130});
  part.Run(kernel.ctx(), {{10, 200}}, 130);
  for (const Matrix* x : {&part.dk, &part.dv}) {
    for (int64_t t = 10; t < 200; ++t) {
      for (int64_t i = 0; i < x->columns(); ++i) ASSERT_EQ(x->at(t, i), 0.0F) << t;
    }
  }
  SparseCase none = Range(whole, {130, 140});
  none.Run(kernel.ctx(), {}, 130);
  for (const Matrix* x : none.Results()) {
    for (const double value : x->values()) ASSERT_TRUE(std::isnan(value));
  }
}

TEST(SparseRangesDeathTest, QueriesOutsideOfTheTokensAbort) {
  KernelTest kernel;
  const SparseCase whole(6, {2, 1, 8}, SmallConfig());
  SparseCase part = Range(whole, {0, 4});
  EXPECT_DEATH(part.Select(kernel.ctx(), {{0, 6}}, 3), "4 queries from token 3 on, of 6 tokens");
}

}  // namespace
}  // namespace sala::kernels
