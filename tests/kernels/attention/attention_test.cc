#include "kernels/attention/attention.h"

#include <complex>
#include <limits>

#include "tests/kernels/attention/attention_case.h"

namespace sala::kernels {
namespace {

using Complex = std::complex<double>;

TEST(AttentionReference, BackwardMatchesComplexStep) {
  const reference::AttentionShape shape = {5, 4, 2, 3, 0.7};
  std::mt19937 rng(3);
  const auto q = Matrix::Random(5, 12, rng).values();
  const auto k = Matrix::Random(5, 6, rng).values();
  const auto v = Matrix::Random(5, 6, rng).values();
  const auto dout = Matrix::Random(5, 12, rng).values();
  // Sparse in a way that differs by key/value head: the gradients must follow the set of keys.
  const reference::Attends attends = [](int64_t t, int64_t g, int64_t j) {
    return j == t || (j + g) % 2 == 0;
  };
  const auto loss = [&](const std::vector<Complex>& zq, const std::vector<Complex>& zk,
                        const std::vector<Complex>& zv) {
    const auto out = reference::AttentionForward(shape, zq, zk, zv, attends).out;
    Complex sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += dout[i] * out[i];
    return sum;
  };
  const std::vector<Complex> zq(q.begin(), q.end());
  const std::vector<Complex> zk(k.begin(), k.end());
  const std::vector<Complex> zv(v.begin(), v.end());
  const auto grad = reference::AttentionBackward(shape, q, k, v, dout, attends);
  ExpectSameGradient(grad.dq, ComplexStep(q, [&](const auto& z) { return loss(z, zk, zv); }));
  ExpectSameGradient(grad.dk, ComplexStep(k, [&](const auto& z) { return loss(zq, z, zv); }));
  ExpectSameGradient(grad.dv, ComplexStep(v, [&](const auto& z) { return loss(zq, zk, z); }));
}

class AttentionLength : public ::testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Edges, AttentionLength,
                         ::testing::Values(1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300));

TEST_P(AttentionLength, MatchesReference) {
  for (const HeadCounts& heads : {HeadCounts{4, 2, 16}, {1, 1, 20}, {16, 1, 8}, {3, 3, 64}}) {
    KernelTest kernel;
    AttentionCase c(GetParam(), heads);
    c.Dense(kernel.ctx(), {{0, c.t}});
    ExpectMatchesReference(c);
    for (const Matrix* result : c.Results()) EXPECT_TRUE(result->GapsUntouched());
    EXPECT_EQ(kernel.arena().used_bytes(), 0U);
  }
}

TEST_P(AttentionLength, DecodeHasTheBitsOfTheLastRow) {
  KernelTest kernel;
  AttentionCase c(GetParam(), {8, 2, 16});
  c.Dense(kernel.ctx(), {{0, c.t}});
  Matrix query = AttentionCase::Rows(c.q, {c.t - 1, c.t});
  Matrix found(1, c.q.columns());
  AttentionDecode(kernel.ctx(), query.tensor().Reshape({8, 16}), c.Narrow(c.k), c.Narrow(c.v),
                  c.scale(), found.tensor().Reshape({8, 16}));
  EXPECT_TRUE(found.SameBits(AttentionCase::Rows(c.out, {c.t - 1, c.t})));
}

// The lengths around the released model's sparse budget (6144) and switch (8192), forward and
// backward. The reference is quadratic: one forward pass of the longest document serves all
// lengths, gradients are compared at a sample of rows.
TEST(Attention, LongDocumentsMatchReference) {
  KernelTest kernel;
#ifdef SALA_SANITIZED  // many times slower: one just behind a block's border stands for all
  const std::vector<int64_t> lengths = {6145};
#else
  const std::vector<int64_t> lengths = {6143, 6144, 6145, 8191, 8192};
#endif
  const AttentionCase longest(lengths.back(), {2, 1, 16});
  const RowsOfReference expected(longest);
  for (const int64_t n : lengths) {
    AttentionCase c = longest.Piece({0, n});
    c.Dense(kernel.ctx(), {{0, n}});
    for (const int64_t t : RowSample(n)) {
      expected.ExpectQuery(c, t);
      expected.ExpectKey(c, t);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Attention, HeadsOfTheReleasedModelMatchReference) {
  for (const int64_t n : {1, 64, 65, 129}) {
    KernelTest kernel;
    AttentionCase c(n, {16, 1, 128});
    c.Dense(kernel.ctx(), {{0, c.t}});
    ExpectMatchesReference(c);
  }
}

TEST(Attention, PackedDocumentsHaveTheBitsOfSeparateOnes) {
  KernelTest kernel;
  const auto documents = DocumentsOf({1, 1, 1, 64, 63, 1, 130, 2, 65, 1});
  AttentionCase packed(documents.back().end, {4, 2, 16});
  packed.Dense(kernel.ctx(), documents);
  for (const DocumentRange& document : documents) {
    AttentionCase alone = packed.Piece(document);
    alone.Dense(kernel.ctx(), {{0, alone.t}});
    for (size_t i = 0; i < alone.Results().size(); ++i) {
      EXPECT_TRUE(alone.Results()[i]->SameBits(AttentionCase::Rows(*packed.Results()[i], document)))
          << "result " << i << " of the document at " << document.begin;
    }
  }
}

TEST(Attention, TokensOutsideTheDocumentsAreNeitherReadNorWritten) {
  KernelTest kernel;
  const auto documents = DocumentsOf({70, 1, 64, 3}, /*gap=*/9);
  const int64_t tokens = documents.back().end + 4;
  AttentionCase inside(tokens, {4, 2, 16});
  inside.Dense(kernel.ctx(), documents);
  AttentionCase poisoned(tokens, {4, 2, 16});
  const std::vector<bool> used = Used(tokens, documents);
  PoisonUnused(poisoned, used);
  poisoned.Dense(kernel.ctx(), documents);
  ExpectSameResults(inside, poisoned);
  ExpectOnlyUsedWritten(poisoned, used);
}

TEST(Attention, ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens) {
  KernelTest kernel;
  const auto documents = DocumentsOf({100, 90, 110});
  AttentionCase before(300, {4, 2, 16});
  before.Dense(kernel.ctx(), documents);
  AttentionCase after(300, {4, 2, 16});
  constexpr int64_t kChanged = 150;
  for (Matrix* x : {&after.q, &after.k, &after.v, &after.dout}) x->at(kChanged, 3) += 1.0F;
  after.Dense(kernel.ctx(), documents);
  for (const DocumentRange& other : {documents[0], documents[2]}) {
    for (size_t i = 0; i < before.Results().size(); ++i) {
      EXPECT_TRUE(AttentionCase::Rows(*before.Results()[i], other)
                      .SameBits(AttentionCase::Rows(*after.Results()[i], other)))
          << "result " << i << " of the document at " << other.begin;
    }
  }
  const DocumentRange earlier = {documents[1].begin, kChanged};
  EXPECT_TRUE(
      AttentionCase::Rows(before.out, earlier).SameBits(AttentionCase::Rows(after.out, earlier)));
  const DocumentRange later = {kChanged, documents[1].end};
  EXPECT_FALSE(
      AttentionCase::Rows(before.out, later).SameBits(AttentionCase::Rows(after.out, later)));
}

TEST(Attention, BitsDoNotDependOnThreadsOrRuns) {
  const auto documents = DocumentsOf({257, 1, 130, 64});
  AttentionCase one(documents.back().end, {8, 2, 16});
  KernelTest single(1);
  one.Dense(single.ctx(), documents);
  for (int threads : {1, 2, 5}) {
    KernelTest many(threads);
    AttentionCase again(documents.back().end, {8, 2, 16});
    again.Dense(many.ctx(), documents);
    ExpectSameResults(one, again);
  }
}

TEST(Attention, LargeScoresStayFinite) {
  KernelTest kernel;
  AttentionCase c(200, {2, 1, 16});
  for (int64_t t = 0; t < c.t; ++t) {
    for (int64_t i = 0; i < c.q.columns(); ++i) c.q.at(t, i) *= 1000.0F;
  }
  c.Dense(kernel.ctx(), {{0, c.t}});
  for (const Matrix* result : c.Results()) {
    for (double x : result->values()) ASSERT_TRUE(std::isfinite(x));
  }
}

TEST(Attention, EqualKeysGiveTheMeanOfTheValues) {
  KernelTest kernel;
  AttentionCase c(77, {2, 2, 16});
  for (int64_t t = 0; t < c.t; ++t) {
    for (int64_t i = 0; i < c.k.columns(); ++i) c.k.at(t, i) = 0.25F;
  }
  c.Dense(kernel.ctx(), {{0, c.t}});
  for (int64_t i = 0; i < c.v.columns(); ++i) {
    double sum = 0;
    double largest = 0;
    for (int64_t t = 0; t < c.t; ++t) {
      sum += c.v.at(t, i);
      largest = std::max(largest, std::abs(static_cast<double>(c.v.at(t, i))));
      // All weights are equal: only the sum over t + 1 values and one division round.
      const auto count = static_cast<double>(t + 1);
      ASSERT_NEAR(c.out.at(t, i), sum / count, (count + 3) * kF32Round * largest);
    }
  }
}

}  // namespace
}  // namespace sala::kernels
