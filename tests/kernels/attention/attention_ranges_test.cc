// Dense attention of ranges of queries on the CPU.
#include "tests/kernels/attention/attention_ranges.h"

namespace sala::kernels {
namespace {

// The whole case in one call against its ranges.
void ExpectRangesGiveTheWhole(const Context& ctx, AttentionCase& whole,
                              const std::vector<DocumentRange>& documents,
                              const std::vector<DocumentRange>& ranges) {
  SCOPED_TRACE("documents" + TextOf(documents) + ", ranges" + TextOf(ranges));
  PoisonUnused(whole, Used(whole.t, documents));
  whole.Dense(ctx, documents);
  JoinedRanges joined(whole);
  for (const DocumentRange& range : ranges) {
    AttentionCase part = QueriesIn(whole, range);
    part.Dense(ctx, documents, range.begin);
    joined.Add(part, range, documents);
  }
  const AttentionCase& results = joined.Results();
  ExpectSameRows(results, whole);
  for (const DocumentRange& document : documents) {
    ExpectMatchesReference(DocumentOf(whole, results, document));
  }
}

TEST(AttentionRanges, RandomRangesGiveTheWhole) {
  KernelTest kernel(2);
  std::mt19937 rng(11);
  for (unsigned i = 0; i < 24; ++i) {
    const HeadCounts heads = i % 2 == 0 ? HeadCounts{4, 2, 16} : HeadCounts{3, 1, 8};
    AttentionCase whole(200 + i, heads, i);
    const auto documents = RandomDocuments(whole.t, i % 3 == 0 ? 230 : 90, rng);
    ExpectRangesGiveTheWhole(kernel.ctx(), whole, documents, RandomRanges(whole.t, rng));
    if (testing::Test::HasFailure()) return;
    EXPECT_EQ(kernel.arena().used_bytes(), 0U);
  }
}

// Borders of tiles (64 tokens, or 16 with 16 heads to a key/value head) and beside them; empty
// ranges at both ends and in the middle.
TEST(AttentionRanges, BordersOfTiles) {
  KernelTest kernel;
  for (const HeadCounts& heads : {HeadCounts{2, 1, 8}, {16, 1, 8}}) {
    for (const auto& borders : {std::vector<int64_t>{64, 128},
                                {0, 63, 63, 65, 200},
                                {15, 16, 17, 18},
                                {1, 2, 198, 199}}) {
      AttentionCase whole(200, heads);
      ExpectRangesGiveTheWhole(kernel.ctx(), whole, {{0, 150}, {150, 200}},
                               RangesOf(borders, whole.t));
    }
  }
}

TEST(AttentionRanges, OneRangeOfAllTokensHasTheBitsOfNone) {
  KernelTest kernel;
  const auto documents = DocumentsOf({70, 1, 64, 3});
  AttentionCase whole(documents.back().end, {4, 2, 16});
  whole.Dense(kernel.ctx(), documents);
  AttentionCase part = QueriesIn(whole, {0, whole.t});
  part.Dense(kernel.ctx(), documents, 0);
  ExpectSameResults(whole, part);
}

TEST(AttentionRanges, NoQueriesGiveZeros) {
  KernelTest kernel;
  const auto documents = DocumentsOf({70, 3}, /*gap=*/2);
  const AttentionCase whole(documents.back().end + 1, {4, 2, 16});
  for (const int64_t first : {int64_t{0}, int64_t{30}, whole.t}) {
    AttentionCase part = QueriesIn(whole, {first, first});
    part.Dense(kernel.ctx(), documents, first);
    const std::vector<bool> used = Used(whole.t, documents);
    for (const Matrix* x : {&part.dk, &part.dv}) {
      for (int64_t t = 0; t < whole.t; ++t) {
        for (int64_t i = 0; i < x->columns(); ++i) {
          if (used[static_cast<size_t>(t)]) {
            ASSERT_EQ(x->at(t, i), 0.0F) << t;
          } else {
            ASSERT_TRUE(std::isnan(x->at(t, i))) << t;
          }
        }
      }
    }
  }
  AttentionCase none = QueriesIn(whole, {10, 20});
  none.Dense(kernel.ctx(), {}, 10);
  for (const Matrix* x : none.Results()) {
    for (const double value : x->values()) ASSERT_TRUE(std::isnan(value));
  }
}

TEST(AttentionRangesDeathTest, QueriesOutsideOfTheTokensAbort) {
  KernelTest kernel;
  const AttentionCase whole(6, {2, 1, 8});
  AttentionCase part = QueriesIn(whole, {0, 4});
  EXPECT_DEATH(part.Dense(kernel.ctx(), {{0, 6}}, 3), "4 queries from token 3 on, of 6 tokens");
  EXPECT_DEATH(part.Dense(kernel.ctx(), {{0, 6}}, -1), "4 queries from token -1 on, of 6 tokens");
  EXPECT_DEATH(part.Dense(kernel.ctx(), {{0, 7}}), "of 6 tokens after");
}

}  // namespace
}  // namespace sala::kernels
