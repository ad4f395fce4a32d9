#include "kernels/kl_divergence/kl_divergence.h"

#include "kernels/kl_divergence/reference.h"
#include "tests/kernels/common/softmax_rows.h"

namespace sala::kernels {
namespace {

constexpr int64_t kTeacherWidth = 16;
constexpr int64_t kWidth = 24;
constexpr float kTeacherScale = 0.5F;
constexpr float kStudentScale = 0.25F;
constexpr float kGradScale = 0.125F;
constexpr float kOldWeightGradient = 0.25F;

struct Problem {
  Problem(int64_t tokens_in, int64_t vocabulary_in, unsigned seed = 51)
      : tokens(tokens_in), vocabulary(vocabulary_in) {
    std::mt19937 rng(seed);
    teacher_hidden = RandomBf16(tokens, kTeacherWidth, rng);
    teacher_weight = RandomBf16(vocabulary, kTeacherWidth, rng);
    hidden = RandomBf16(tokens, kWidth, rng);
    weight = RandomBf16(vocabulary, kWidth, rng);
  }
  int64_t tokens, vocabulary;
  Matrix teacher_hidden{1, 1}, teacher_weight{1, 1}, hidden{1, 1}, weight{1, 1};
};

struct Found {
  Found(const Problem& p, bool with_dhidden, bool with_dweight)
      : dhidden(DType::kBF16, with_dhidden ? p.tokens : 0, kWidth, 8),
        dweight(DType::kF32,
                Matrix::Filled(with_dweight ? p.vocabulary : 0, kWidth, kOldWeightGradient), 16) {}
  KlDivergenceResult result;
  DeviceMatrix dhidden, dweight;
};

Found Compute(const Context& ctx, const Problem& p, int64_t chunk, float tau,
              bool with_dhidden = true, bool with_dweight = true) {
  const DeviceMatrix teacher_hidden(DType::kBF16, p.teacher_hidden, 8),
      teacher_weight(DType::kBF16, p.teacher_weight, 16), hidden(DType::kBF16, p.hidden, 24),
      weight(DType::kBF16, p.weight, 8);
  Found found(p, with_dhidden, with_dweight);
  found.result =
      KlDivergence(ctx, teacher_hidden.tensor(), teacher_weight.tensor(), hidden.tensor(),
                   weight.tensor(), {kTeacherScale, kStudentScale, tau, kGradScale, chunk},
                   with_dhidden ? found.dhidden.tensor() : sala::Tensor(),
                   with_dweight ? found.dweight.tensor() : sala::Tensor());
  return found;
}

// Logits / tau, by the reference.
std::vector<double> Scaled(const Matrix& hidden, const Matrix& weight, double scale) {
  const auto h = hidden.values();
  const auto w = weight.values();
  return reference::Logits(hidden.rows(), hidden.columns(), weight.rows(), scale, h.data(),
                           w.data());
}

void ExpectRight(const Problem& p, double tau, const Found& found) {
  const auto teacher = Scaled(p.teacher_hidden, p.teacher_weight, kTeacherScale / tau);
  const auto student = Scaled(p.hidden, p.weight, kStudentScale / tau);
  const double spread = std::max(Spread(p.vocabulary, teacher), Spread(p.vocabulary, student));
  // An error d of the logits (2 roundings more for their scale, 1 / tau) moves each of two
  // log-probabilities by at most 2 d, and the weights by a factor 1 + 2 d on terms of size
  // `range`. The sums add their errors twice, as a divisor and in the terms.
  const double logit_error = LogitError(p.teacher_hidden, p.teacher_weight, kTeacherScale / tau) +
                             LogitError(p.hidden, p.weight, kStudentScale / tau) +
                             2 * kF32Round * spread;
  const double range = std::log(static_cast<double>(p.vocabulary)) + 2 * spread;
  const double sum_error = RowSumError(p.vocabulary, spread);
  const double error = 2 * (2 + range) * logit_error + 2 * (1 + range) * sum_error;

  double loss = 0;
  double entropy = 0;
  int64_t agree = 0;
  std::vector<double> dlogits(student.size());
  std::vector<double> size(student.size());
  for (int64_t t = 0; t < p.tokens; ++t) {
    const double* a = teacher.data() + t * p.vocabulary;
    const double* b = student.data() + t * p.vocabulary;
    const std::vector<double> log_p = reference::LogSoftmax(p.vocabulary, a);
    const std::vector<double> log_q = reference::LogSoftmax(p.vocabulary, b);
    for (int64_t v = 0; v < p.vocabulary; ++v) {
      const auto i = static_cast<size_t>(v);
      const double probability = std::exp(log_p[i]);
      loss += tau * tau * probability * (log_p[i] - log_q[i]);
      entropy -= probability * log_p[i];
      const auto at = static_cast<size_t>(t * p.vocabulary + v);
      dlogits[at] = kGradScale * tau * (std::exp(log_q[i]) - probability);
      size[at] = kGradScale * tau * (std::exp(log_q[i]) + probability);
    }
    agree += std::max_element(a, a + p.vocabulary) - a == std::max_element(b, b + p.vocabulary) - b
                 ? 1
                 : 0;
  }
  const auto tokens = static_cast<double>(p.tokens);
  EXPECT_NEAR(found.result.loss_sum, loss, tokens * tau * tau * error);
  EXPECT_NEAR(found.result.teacher_entropy, entropy, tokens * error);
  EXPECT_EQ(found.result.agree, agree);
  EXPECT_EQ(found.result.tokens, p.tokens);
  // Each probability: what its sum and its own exponential have, then one rounding to bfloat16.
  const HeadGradient expected(p.hidden, p.weight, kStudentScale, dlogits, size, kOldWeightGradient);
  const double gradient_error = 2 * logit_error + 2 * sum_error + 1.01 * kBf16Round;
  if (found.dhidden.rows() > 0) expected.ExpectHidden(found.dhidden, gradient_error);
  if (found.dweight.rows() > 0) expected.ExpectWeight(found.dweight, gradient_error);
}

using KlDivergenceCuda = CudaKernelTest;

TEST_F(KlDivergenceCuda, AgreesWithReference) {
  for (const int64_t tokens : EdgeSizes()) {
    if (kSlowBuild && tokens > 1 && tokens != 33) continue;
    const Problem p(tokens, 61);
    ExpectRight(p, 1.0, Compute(ctx(), p, 13, 1.0F));
    ExpectRight(p, 2.5, Compute(ctx(), p, 64, 2.5F));
    if (!kSlowBuild) ExpectRight(p, 1.0, Compute(ctx(), p, 1000, 1.0F));
  }
}

// One pack of 8, whole and broken; around one step of a block; several steps.
TEST_F(KlDivergenceCuda, AnyVocabulary) {
  for (const int64_t vocabulary : {1, 2, 7, 8, 9, 4095, 4096, 4097, 4105, 9001}) {
    if (kSlowBuild && vocabulary > 4097) continue;
    const Problem p(kSlowBuild ? 2 : 6, vocabulary, 52);
    ExpectRight(p, 1.5, Compute(ctx(), p, 4, 1.5F));
  }
}

TEST_F(KlDivergenceCuda, RepeatsToTheBit) {
  const Problem p(kSlowBuild ? 9 : 33, 999);
  const Found first = Compute(ctx(), p, 8, 1.0F);
  for (int i = 0; i < 2; ++i) {
    const Found again = Compute(ctx(), p, 8, 1.0F);
    EXPECT_EQ(again.result.loss_sum, first.result.loss_sum);
    EXPECT_EQ(again.result.teacher_entropy, first.result.teacher_entropy);
    EXPECT_EQ(again.dhidden.Bytes(), first.dhidden.Bytes());
    EXPECT_EQ(again.dweight.Bytes(), first.dweight.Bytes());
  }
}

TEST_F(KlDivergenceCuda, GradientsMayBeLeftOut) {
  const Problem p(kSlowBuild ? 9 : 20, 61);
  const Found all = Compute(ctx(), p, 8, 1.0F);
  const Found none = Compute(ctx(), p, 8, 1.0F, false, false);
  EXPECT_EQ(none.result.loss_sum, all.result.loss_sum);
  EXPECT_EQ(none.result.teacher_entropy, all.result.teacher_entropy);
  EXPECT_EQ(none.result.agree, all.result.agree);
  EXPECT_EQ(Compute(ctx(), p, 8, 1.0F, true, false).dhidden.Bytes(), all.dhidden.Bytes());
  EXPECT_EQ(Compute(ctx(), p, 8, 1.0F, false, true).dweight.Bytes(), all.dweight.Bytes());
}

// Both heads come from the same product with the same plan, and every difference of the two is of
// equal bits: nothing remains to be rounded.
TEST_F(KlDivergenceCuda, EqualModelsGiveZeroLossAndZeroGradient) {
  for (const int64_t vocabulary : {61, 4200}) {
    const Problem p(9, vocabulary);
    const DeviceMatrix hidden(DType::kBF16, p.hidden), weight(DType::kBF16, p.weight);
    for (const float tau : {1.0F, 0.7F}) {
      const DeviceMatrix dhidden(DType::kBF16, 9, kWidth);
      const DeviceMatrix dweight(DType::kF32, Matrix::Filled(vocabulary, kWidth, 0));
      const KlDivergenceResult result = KlDivergence(
          ctx(), hidden.tensor(), weight.tensor(), hidden.tensor(), weight.tensor(),
          {kStudentScale, kStudentScale, tau, kGradScale, 4}, dhidden.tensor(), dweight.tensor());
      EXPECT_EQ(result.loss_sum, 0.0);
      EXPECT_EQ(result.agree, 9);
      EXPECT_GT(result.teacher_entropy, 0.0);
      for (const float x : dhidden.Download().values<float>()) ASSERT_EQ(x, 0.0F);
      for (const float x : dweight.Download().values<float>()) ASSERT_EQ(x, 0.0F);
    }
  }
}

// A student a little off its teacher: the divergence is of second order, far below what bfloat16
// logits would allow to see.
TEST_F(KlDivergenceCuda, SmallDivergencesAreSeen) {
  constexpr int64_t kTokens = 16;
  constexpr int64_t kVocabulary = 200;
  std::mt19937 rng(53);
  Problem p(kTokens, kVocabulary);
  const Matrix hidden = RandomBf16(kTokens, 8, rng, 4.0F);
  const Matrix weight = RandomBf16(kVocabulary, 8, rng);
  Matrix moved = weight;
  for (int64_t v = 0; v < kVocabulary; ++v) {
    // Half a percent of one column in 8, then exact in bfloat16 again.
    moved.at(v, 0) = static_cast<float>(BF16(weight.at(v, 0) * 1.006F));
  }
  const DeviceMatrix h(DType::kBF16, hidden), w(DType::kBF16, weight), m(DType::kBF16, moved);
  const KlDivergenceResult result = KlDivergence(ctx(), h.tensor(), w.tensor(), h.tensor(),
                                                 m.tensor(), {1.0F, 1.0F, 1.0F, 1.0F, 64}, {}, {});
  const auto a = Scaled(hidden, weight, 1);
  const auto b = Scaled(hidden, moved, 1);
  const double expected =
      reference::KlDivergenceForward(kTokens, kVocabulary, 1.0, a.data(), b.data());
  EXPECT_LT(expected, 1e-3 * kTokens);
  EXPECT_GT(expected, 1e-6 * kTokens);
  // The logits' errors enter multiplied by their difference, a few hundredths; those of the sums
  // are nearly equal on both sides and cancel, but for the roundings of each: 1e-6 a token.
  EXPECT_NEAR(result.loss_sum, expected, 2e-6 * kTokens);
}

TEST_F(KlDivergenceCuda, DryRunNeedsTheScratchOfARealRun) {
  auto opened = OpenCudaDevice({.host = "test", .dry = true});
  ASSERT_TRUE(opened.ok());
  const std::unique_ptr<Device> dry = std::move(opened).value();
  Arena memory(size_t{1} << 20, dry.get());
  Arena scratch(size_t{1} << 20, dry.get());
  const Context context = {DeviceKind::kCuda, nullptr, &scratch, dry.get()};
  KlDivergence(context, memory.New(DType::kBF16, {33, 8}), memory.New(DType::kBF16, {61, 8}),
               memory.New(DType::kBF16, {33, 16}), memory.New(DType::kBF16, {61, 16}),
               {1.0F, 1.0F, 1.0F, 1.0F, 16}, memory.New(DType::kBF16, {33, 16}),
               memory.New(DType::kF32, {61, 16}));
  // Two logits, three numbers a token, three sums, the work space of a product on an sm_90; in 256
  // bytes.
  const auto round = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  EXPECT_EQ(scratch.peak_bytes(), 2 * round(size_t{16} * 64 * 4) + round(size_t{33} * 24) +
                                      round(24) + (size_t{64} << 20));
}

}  // namespace
}  // namespace sala::kernels
