#include "kernels/sparse_attention/sparse_attention.h"

#include <complex>
#include <limits>

#include "tests/kernels/sparse_attention/sparse_case.h"

namespace sala::kernels {
namespace {

class SparseLength : public ::testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Edges, SparseLength,
                         ::testing::Values(1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 112, 113, 127,
                                           128, 129, 320));

TEST_P(SparseLength, MatchesReferenceWithTheSameBlocks) {
  for (const HeadCounts& heads : {HeadCounts{16, 1, 16}, {4, 2, 8}, {2, 2, 20}}) {
    KernelTest kernel;
    SparseCase c(GetParam(), heads, SmallConfig());
    c.Run(kernel.ctx(), {{0, c.t}});
    ExpectMatchesReference(c, c.SeenKeys());
    for (const Matrix* result : c.Results()) EXPECT_TRUE(result->GapsUntouched());
    EXPECT_EQ(kernel.arena().used_bytes(), 0U);
  }
}

TEST_P(SparseLength, DecodeHasTheBitsOfTheLastRow) {
  KernelTest kernel;
  SparseCase c(GetParam(), {8, 2, 16}, SmallConfig());
  c.Select(kernel.ctx(), {{0, c.t}});
  c.Forward(kernel.ctx(), {{0, c.t}});
  Matrix query = AttentionCase::Rows(c.q, {c.t - 1, c.t});
  Matrix found(1, c.q.columns());
  SparseAttentionDecode(kernel.ctx(), query.tensor().Reshape({8, 16}), c.Narrow(c.k), c.Narrow(c.v),
                        c.config, c.scale(), found.tensor().Reshape({8, 16}));
  EXPECT_TRUE(found.SameBits(AttentionCase::Rows(c.out, {c.t - 1, c.t})));
}

TEST(SparseAttention, HasTheBitsOfDenseWhereTheBudgetCoversThePast) {
  KernelTest kernel;
  SparseAttentionConfig config;  // blocks of 64, as the dense form
  config.window_size = 128;
  config.topk = 4;
  const int64_t covered = config.total_blocks() * config.block_size;
  ASSERT_EQ(covered, 384);
  const auto documents = DocumentsOf({covered, 1, covered - 1, 200});
  SparseCase sparse(documents.back().end, {8, 2, 16}, config);
  sparse.Run(kernel.ctx(), documents);
  AttentionCase dense(sparse.t, sparse.heads);
  dense.Dense(kernel.ctx(), documents);
  ExpectSameResults(sparse, dense);
  // One token more, and the last one has to leave a block out.
  SparseCase longer(covered + 1, {8, 2, 16}, config);
  longer.Run(kernel.ctx(), {{0, longer.t}});
  AttentionCase longer_dense(covered + 1, {8, 2, 16});
  longer_dense.Dense(kernel.ctx(), {{0, longer.t}});
  const DocumentRange past = {0, covered};
  EXPECT_TRUE(
      AttentionCase::Rows(longer.out, past).SameBits(AttentionCase::Rows(longer_dense.out, past)));
  const DocumentRange last = {covered, covered + 1};
  EXPECT_FALSE(
      AttentionCase::Rows(longer.out, last).SameBits(AttentionCase::Rows(longer_dense.out, last)));
}

// The released model's block numbers, 16 heads to one key/value head. One dense run serves all
// lengths: a row of causal attention does not depend on what follows.
TEST(SparseAttention, ReleasedBlockNumbersAtTheEdgeLengths) {
  KernelTest kernel;
  constexpr int64_t kCovered = 6144;
#ifdef SALA_SANITIZED  // three minutes with all: fewer heads and lengths take the same branches
  const HeadCounts heads = {4, 1, 8};
  const std::vector<int64_t> lengths = {kCovered - 1, kCovered, kCovered + 1};
#else
  const HeadCounts heads = {16, 1, 8};
  const std::vector<int64_t> lengths = {kCovered - 1, kCovered, kCovered + 1, 8191, 8192};
#endif
  const SparseAttentionConfig config;
  AttentionCase dense(lengths.back(), heads);
  AttentionForward(kernel.ctx(), dense.Wide(dense.q), dense.Narrow(dense.k), dense.Narrow(dense.v),
                   DocumentsOf({kCovered}), dense.scale(), dense.Wide(dense.out),
                   dense.lse.tensor());
  for (int64_t n : lengths) {
    SparseCase c(n, heads, config);
    static_cast<AttentionCase&>(c) = dense.Piece({0, n});
    c.Select(kernel.ctx(), {{0, n}});
    ExpectWellFormed(c);
    c.Forward(kernel.ctx(), {{0, n}});
    const DocumentRange covered = {0, std::min(n, kCovered)};
    EXPECT_TRUE(
        AttentionCase::Rows(c.out, covered).SameBits(AttentionCase::Rows(dense.out, covered)))
        << "length " << n;
    const auto q = c.q.values();
    const auto k = c.k.values();
    const auto v = c.v.values();
    const auto shape = c.Shape();
    const auto keys = reference::CompressKeys(shape, k, config);
    const AttentionBounds bounds(shape, q, k, v);
    for (int64_t t : {int64_t{0}, int64_t{126}, int64_t{127}, int64_t{2175}, n - 2, n - 1}) {
      ExpectChoice(c, reference::Select(shape, q, keys, config, t, 0), t, 0);
      const std::vector<int64_t> seen = c.Seen(t, 0);
      EXPECT_EQ(static_cast<int64_t>(seen.size()), std::min<int64_t>(96, t / 64 + 1));
      const reference::Attends attends = [&seen](int64_t, int64_t, int64_t j) {
        return std::binary_search(seen.begin(), seen.end(), j / 64);
      };
      for (int64_t h = 0; h < heads.query; h += 5) {
        std::vector<double> expected(static_cast<size_t>(heads.d));
        const double lse = reference::AttendRow(shape, q, k, v, attends, t, h, expected.data());
        ASSERT_NEAR(c.lse.at(t, h), lse, bounds.Lse(lse)) << "token " << t;
        for (int64_t i = 0; i < heads.d; ++i) {
          ASSERT_NEAR(c.out.at(t, h * heads.d + i), expected[static_cast<size_t>(i)], bounds.Out())
              << "token " << t << " of " << n;
        }
      }
    }
  }
}

TEST(SparseAttention, ReleasedBlockNumbersOnShortDocumentsMatchReference) {
  for (const int64_t n : {1, 31, 32, 63, 64, 65, 127, 128}) {
    KernelTest kernel;
    SparseCase c(n, {16, 1, 16}, SparseAttentionConfig());
    c.Run(kernel.ctx(), {{0, n}});
    ExpectWellFormed(c);
    ExpectMatchesReference(c, c.SeenKeys());
  }
}

// Forward and backward with two heads. The choice of blocks and a row of the forward pass depend on
// nothing that follows, so one reference of the longest document serves all lengths; gradients are
// compared at a sample of rows.
TEST(SparseAttention, ReleasedBlockNumbersForwardAndBackwardMatchReference) {
  KernelTest kernel;
  constexpr int64_t kCovered = 6144;
#ifdef SALA_SANITIZED  // many times slower: one past the budget takes every branch
  const std::vector<int64_t> lengths = {kCovered + 1};
#else
  const std::vector<int64_t> lengths = {kCovered - 1, kCovered, kCovered + 1, 8191, 8192};
#endif
  SparseCase longest(lengths.back(), {2, 1, 16}, SparseAttentionConfig());
  longest.Select(kernel.ctx(), {{0, longest.t}});
  const RowsOfReference expected(longest, longest.SeenKeys());
  for (const int64_t n : lengths) {
    SparseCase c = longest.SparsePiece({0, n});
    c.Run(kernel.ctx(), {{0, n}});
    ASSERT_TRUE(std::equal(c.chosen.begin(), c.chosen.end(), longest.chosen.begin()));
    for (const int64_t t : RowSample(n)) {
      expected.ExpectQuery(c, t);
      expected.ExpectKey(c, t);
      if (HasFatalFailure()) return;
    }
    if (n > kCovered) continue;
    AttentionCase dense = longest.Piece({0, n});
    dense.Dense(kernel.ctx(), {{0, n}});
    ExpectSameResults(c, dense);
  }
}

TEST(SparseReference, BackwardMatchesComplexStepWithTheBlocksHeldFixed) {
  using Complex = std::complex<double>;
  SparseAttentionConfig config;
  config.kernel_size = 2;
  config.kernel_stride = 1;
  config.block_size = 2;
  config.window_size = 2;
  config.topk = 3;
  const reference::AttentionShape shape = {14, 2, 1, 2, 0.7};
  std::mt19937 rng(4);
  std::vector<std::vector<double>> x;
  for (int64_t columns : {4, 2, 2, 4}) x.push_back(Matrix::Random(14, columns, rng).values());
  const auto keys = reference::CompressKeys(shape, x[1], config);
  std::vector<std::vector<int64_t>> chosen;
  for (int64_t t = 0; t < 14; ++t) {
    chosen.push_back(reference::Select(shape, x[0], keys, config, t, 0).chosen);
  }
  ASSERT_LT(chosen[13].size(), 7U);  // a block is left out
  const reference::Attends attends = [&chosen](int64_t t, int64_t, int64_t j) {
    const auto& row = chosen[static_cast<size_t>(t)];
    return std::binary_search(row.begin(), row.end(), j / 2);
  };
  std::vector<std::vector<Complex>> z;
  for (const auto& input : x) z.emplace_back(input.begin(), input.end());
  using Input = std::vector<Complex>;
  const auto loss = [&](const Input& q, const Input& k, const Input& v) {
    const auto out = reference::AttentionForward(shape, q, k, v, attends).out;
    Complex sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += x[3][i] * out[i];
    return sum;
  };
  const auto grad = reference::AttentionBackward(shape, x[0], x[1], x[2], x[3], attends);
  ExpectSameGradient(grad.dq,
                     ComplexStep(x[0], [&](const Input& a) { return loss(a, z[1], z[2]); }));
  ExpectSameGradient(grad.dk,
                     ComplexStep(x[1], [&](const Input& a) { return loss(z[0], a, z[2]); }));
  ExpectSameGradient(grad.dv,
                     ComplexStep(x[2], [&](const Input& a) { return loss(z[0], z[1], a); }));
}

TEST(SparseAttention, PackedDocumentsHaveTheBitsOfSeparateOnes) {
  KernelTest kernel;
  const auto documents = DocumentsOf({1, 1, 200, 1, 16, 15, 130, 1});
  SparseCase packed(documents.back().end, {4, 2, 8}, SmallConfig());
  packed.Run(kernel.ctx(), documents);
  for (const DocumentRange& document : documents) {
    SparseCase alone = packed.SparsePiece(document);
    alone.Run(kernel.ctx(), {{0, alone.t}});
    for (size_t i = 0; i < alone.Results().size(); ++i) {
      EXPECT_TRUE(alone.Results()[i]->SameBits(AttentionCase::Rows(*packed.Results()[i], document)))
          << "result " << i << " of the document at " << document.begin;
    }
  }
}

TEST(SparseAttention, TokensOutsideTheDocumentsAreNeitherReadNorWritten) {
  KernelTest kernel;
  const auto documents = DocumentsOf({150, 1, 140}, /*gap=*/6);
  const int64_t tokens = documents.back().end + 5;
  SparseCase inside(tokens, {4, 2, 8}, SmallConfig());
  inside.Run(kernel.ctx(), documents);
  SparseCase poisoned(tokens, {4, 2, 8}, SmallConfig());
  const std::vector<bool> used = Used(tokens, documents);
  PoisonUnused(poisoned, used);
  poisoned.Run(kernel.ctx(), documents);
  ExpectSameResults(inside, poisoned);
  ExpectOnlyUsedWritten(poisoned, used);
}

TEST(SparseAttention, ChangingOneTokenReachesOnlyItsDocument) {
  KernelTest kernel;
  const auto documents = DocumentsOf({160, 200, 150});
  SparseCase before(510, {4, 2, 8}, SmallConfig());
  before.Run(kernel.ctx(), documents);
  SparseCase after(510, {4, 2, 8}, SmallConfig());
  constexpr int64_t kChanged = 300;
  for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) x->at(kChanged, 3) += 1.0F;
  after.Run(kernel.ctx(), documents);
  for (const DocumentRange& other : {documents[0], documents[2]}) {
    for (size_t i = 0; i < before.Results().size(); ++i) {
      EXPECT_TRUE(AttentionCase::Rows(*before.Results()[i], other)
                      .SameBits(AttentionCase::Rows(*after.Results()[i], other)))
          << "result " << i << " of the document at " << other.begin;
    }
  }
  EXPECT_FALSE(AttentionCase::Rows(before.dk, documents[1])
                   .SameBits(AttentionCase::Rows(after.dk, documents[1])));
}

TEST(SparseAttention, BitsDoNotDependOnThreadsOrRuns) {
  const auto documents = DocumentsOf({257, 1, 130, 64});
  SparseCase one(documents.back().end, {8, 2, 16}, SmallConfig());
  KernelTest single(1);
  one.Run(single.ctx(), documents);
  for (int threads : {1, 2, 5}) {
    KernelTest many(threads);
    SparseCase again(documents.back().end, {8, 2, 16}, SmallConfig());
    again.Run(many.ctx(), documents);
    EXPECT_EQ(one.chosen, again.chosen);
    ExpectSameResults(one, again);
  }
}

TEST(SparseAttention, BlocksNobodySelectedGetNoGradient) {
  KernelTest kernel;
  SparseCase c(320, {4, 1, 8}, SmallConfig());
  // Only the last token is looked at, so the blocks it left out are in nobody's list.
  for (int64_t t = 0; t + 1 < c.t; ++t) {
    for (int64_t i = 0; i < c.dout.columns(); ++i) c.dout.at(t, i) = 0.0F;
  }
  c.Run(kernel.ctx(), {{0, c.t}});
  const std::vector<int64_t> seen = c.Seen(c.t - 1, 0);
  ASSERT_EQ(seen.size(), 7U);
  for (int64_t t = 0; t < c.t; ++t) {
    const bool in_list = std::binary_search(seen.begin(), seen.end(), t / c.config.block_size);
    for (int64_t i = 0; i < c.dk.columns(); ++i) {
      ASSERT_EQ(c.dv.at(t, i) != 0.0F, in_list) << t;
      ASSERT_EQ(c.dk.at(t, i) != 0.0F, in_list) << t;
    }
  }
}

TEST(SparseAttention, BlocksThatCannotBeFreeAbort) {
  KernelTest kernel;
  SparseCase c(320, {4, 1, 8}, SmallConfig());
  c.Select(kernel.ctx(), {{0, c.t}});
  c.chosen[static_cast<size_t>((c.t - 1) * c.width())] = 19;  // its own block
  EXPECT_DEATH(c.Forward(kernel.ctx(), {{0, c.t}}), "block 19 is not free at position 319");
}

}  // namespace
}  // namespace sala::kernels
