#include "kernels/cross_entropy/cross_entropy.h"

#include "kernels/cross_entropy/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

constexpr int64_t kWidth = 19;
constexpr int64_t kVocabulary = 67;
constexpr float kLogitScale = 0.5F;
constexpr float kGradScale = 0.125F;

// The loss and the probabilities inherit the logits' absolute error (twice: label and log-sum-exp),
// besides exp's 4 roundings and 80 of a block's sum.
double LossError(const Matrix& hidden, const Matrix& weight) {
  return 2 * LogitError(hidden, weight, kLogitScale) + 84 * kF32Round;
}

struct Problem {
  explicit Problem(int64_t n, uint32_t seed = 41) : tokens(n) {
    std::mt19937 rng(seed);
    hidden = Matrix::Random(n, kWidth, rng, 3);
    weight = Matrix::Random(kVocabulary, kWidth, rng, 1);
    std::uniform_int_distribution<int32_t> pick(-1, kVocabulary - 1);
    labels.resize(static_cast<size_t>(n) + 1);
    for (int32_t& l : labels) l = pick(rng);
    if (n > 2) labels[2] = -1;
  }
  sala::Tensor label_tensor() { return sala::Tensor(labels.data(), {tokens}); }
  int64_t tokens;
  Matrix hidden{1, 1};
  Matrix weight{1, 1};
  std::vector<int32_t> labels;
};

struct Found {
  explicit Found(int64_t tokens) : token_loss(1, tokens), dhidden(tokens, kWidth, 2) {}
  CrossEntropyResult result;
  Matrix token_loss;
  Matrix dhidden;
  Matrix dweight = Matrix::Filled(kVocabulary, kWidth, 0.25F, 1);
};

Found Compute(Problem& p, int64_t chunk, int threads = 1) {
  Found found(p.tokens);
  KernelTest test(threads);
  const CrossEntropyOptions options{kLogitScale, kGradScale, chunk};
  found.result =
      CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options,
                   found.token_loss.vector(), found.dhidden.tensor(), found.dweight.tensor());
  EXPECT_EQ(test.arena().used_bytes(), 0U);
  return found;
}

TEST(CrossEntropy, AgreesWithReference) {
  for (int64_t tokens : EdgeSizes()) {
    Problem p(tokens);
    const auto h = p.hidden.values();
    const auto w = p.weight.values();
    const double loss = reference::CrossEntropyForward(tokens, kWidth, kVocabulary, kLogitScale,
                                                       h.data(), w.data(), p.labels.data());
    std::vector<double> dh(h.size());
    std::vector<double> dw(w.size(), 0.25);
    reference::CrossEntropyBackward(tokens, kWidth, kVocabulary, kLogitScale, kGradScale, h.data(),
                                    w.data(), p.labels.data(), dh.data(), dw.data());
    Found found = Compute(p, 16);
    const double loss_error = LossError(p.hidden, p.weight);
    EXPECT_NEAR(found.result.loss_sum, loss, static_cast<double>(tokens) * loss_error);
    // A row of dlogits has absolute values summing to at most 2 grad_scale, relative error
    // loss_error; the product with the weight sums kVocabulary terms.
    const double dlogits_error = 2 * kGradScale * (loss_error + kVocabulary * kF32Round);
    ExpectClose(found.dhidden, dh, [&](size_t) { return kLogitScale * 5 * dlogits_error; });
    const auto t = static_cast<double>(tokens);
    ExpectClose(found.dweight, dw, [&](size_t i) {
      return kLogitScale * 5 * kGradScale * t * (loss_error + t * kF32Round) +
             (t / 16 + 2) * kF32Round * (std::abs(dw[i]) + kLogitScale * 5 * kGradScale * t);
    });
    EXPECT_TRUE(found.dhidden.GapsUntouched() && found.dweight.GapsUntouched());
  }
}

TEST(CrossEntropy, CountsTargetsAndCorrectOnes) {
  // Identity weights: the logits are the hidden states.
  Matrix hidden = Matrix::Filled(4, 3, 0);
  Matrix weight = Matrix::Filled(3, 3, 0);
  for (int64_t i = 0; i < 3; ++i) weight.at(i, i) = 1;
  hidden.at(0, 2) = 1;  // arg-max 2
  hidden.at(1, 1) = 1;  // arg-max 1
  hidden.at(2, 1) = 2;  // a tie of 1 and 2 goes to 1
  hidden.at(2, 2) = 2;
  std::vector<int32_t> labels = {2, 0, 1, -1};
  KernelTest test;
  Matrix token_loss(1, 4);
  const CrossEntropyResult result =
      CrossEntropy(test.ctx(), hidden.tensor(), weight.tensor(), sala::Tensor(labels.data(), {4}),
                   {}, token_loss.vector(), {}, {});
  EXPECT_EQ(result.targets, 3);
  EXPECT_EQ(result.correct, 2);
  // Exact inputs: exp's 4 roundings, the sum's few, and the rounding of the loss to float32.
  const double bound = 10 * kF32Round;
  EXPECT_NEAR(token_loss.at(0, 0), std::log(2 + std::exp(1.0)) - 1, bound);
  EXPECT_NEAR(token_loss.at(0, 1), std::log(2 + std::exp(1.0)), bound);
  EXPECT_NEAR(token_loss.at(0, 2), std::log(1 + 2 * std::exp(2.0)) - 2, bound);
  EXPECT_EQ(token_loss.at(0, 3), 0.0F);
}

TEST(CrossEntropy, ChunksAndThreadsDoNotChangeLossAndHiddenGradient) {
  Problem p(129);
  Found one = Compute(p, 512);
  for (int64_t chunk : {1, 7, 64, 128, 129, 130}) {
    Found other = Compute(p, chunk, chunk == 64 ? 3 : 1);
    EXPECT_EQ(one.result.loss_sum, other.result.loss_sum) << chunk;
    EXPECT_EQ(one.result.correct, other.result.correct);
    EXPECT_TRUE(one.token_loss.SameBits(other.token_loss)) << chunk;
    EXPECT_TRUE(one.dhidden.SameBits(other.dhidden)) << chunk;
    // dweight adds the chunks' float32 sums: 129 products and at most 129 chunks, terms below 5
    // kGradScale kLogitScale.
    const auto expected = one.dweight.values();
    ExpectClose(other.dweight, expected, [&](size_t) {
      return 2 * 129 * kF32Round * (0.25 + 129 * 5 * kGradScale * kLogitScale);
    });
  }
  Found threads = Compute(p, 512, 3);
  EXPECT_TRUE(one.dweight.SameBits(threads.dweight));
}

TEST(CrossEntropy, EachOutputMayBeLeftOut) {
  Problem p(33);
  Found all = Compute(p, 16);
  KernelTest test;
  const CrossEntropyOptions options{kLogitScale, kGradScale, 16};
  const auto loss_only = CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(),
                                      p.label_tensor(), options, {}, {}, {});
  EXPECT_EQ(loss_only.loss_sum, all.result.loss_sum);
  Matrix dhidden(33, kWidth);
  CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options, {},
               dhidden.tensor(), {});
  EXPECT_TRUE(dhidden.SameBits(all.dhidden));
  Matrix dweight = Matrix::Filled(kVocabulary, kWidth, 0.25F);
  CrossEntropy(test.ctx(), p.hidden.tensor(), p.weight.tensor(), p.label_tensor(), options, {}, {},
               dweight.tensor());
  EXPECT_TRUE(dweight.SameBits(all.dweight));
}

TEST(CrossEntropy, TokensWithoutTargetGetNoGradient) {
  Problem p(40);
  Found found = Compute(p, 16);
  for (int64_t t = 0; t < 40; ++t) {
    if (p.labels[static_cast<size_t>(t)] >= 0) continue;
    for (int64_t i = 0; i < kWidth; ++i) ASSERT_EQ(found.dhidden.at(t, i), 0.0F);
    ASSERT_EQ(found.token_loss.at(0, t), 0.0F);
  }
}

TEST(CrossEntropy, LargeLogitsStayFinite) {
  Problem p(5);
  for (int64_t t = 0; t < 5; ++t) {
    for (int64_t i = 0; i < kWidth; ++i) p.hidden.at(t, i) *= 1e4F;
  }
  Found found = Compute(p, 2);
  EXPECT_TRUE(std::isfinite(found.result.loss_sum));
  for (float g : found.dhidden.values<float>()) ASSERT_TRUE(std::isfinite(g));
  p.hidden.at(0, 0) = std::numeric_limits<float>::quiet_NaN();
  p.labels[0] = 1;
  EXPECT_TRUE(std::isnan(Compute(p, 2).result.loss_sum));
}

TEST(CrossEntropy, ReferenceBackwardEqualsComplexStep) {
  constexpr int64_t kT = 4;
  constexpr int64_t kW = 3;
  constexpr int64_t kV = 5;
  using C = std::complex<double>;
  std::mt19937 rng(43);
  const auto h = Matrix::Random(kT, kW, rng).values();
  const auto w = Matrix::Random(kV, kW, rng).values();
  const std::vector<int32_t> labels = {3, -1, 0, 4};
  const std::vector<C> hc(h.begin(), h.end());
  const std::vector<C> wc(w.begin(), w.end());
  std::vector<double> dh(h.size());
  std::vector<double> dw(w.size());
  reference::CrossEntropyBackward(kT, kW, kV, 0.7, 1.3, h.data(), w.data(), labels.data(),
                                  dh.data(), dw.data());
  const auto loss = [&](const std::vector<C>& hidden, const std::vector<C>& weight) {
    return 1.3 * reference::CrossEntropyForward(kT, kW, kV, 0.7, hidden.data(), weight.data(),
                                                labels.data());
  };
  ExpectSameGradient(dh, ComplexStep(h, [&](const auto& z) { return loss(z, wc); }));
  ExpectSameGradient(dw, ComplexStep(w, [&](const auto& z) { return loss(hc, z); }));
}

}  // namespace
}  // namespace sala::kernels
