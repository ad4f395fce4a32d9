// Inputs from 1e-20 to 1e20, and what happens where float32 must overflow: results are right, or
// not finite, never plausible and wrong. A step whose loss or gradient is not finite is skipped
// (recipes/optimizer.h).
#include <limits>

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/cross_entropy/reference.h"
#include "kernels/kl_divergence/kl_divergence.h"
#include "kernels/kl_divergence/reference.h"
#include "kernels/lightning/lightning.h"
#include "kernels/lightning/reference.h"
#include "kernels/mse/mse.h"
#include "kernels/mse/reference.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/output_gate/reference.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/qk_norm_rope/reference.h"
#include "kernels/rms_norm/reference.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/swiglu/reference.h"
#include "kernels/swiglu/swiglu.h"
#include "tests/kernels/attention/attention_case.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

constexpr float kEps = 1e-6F;
constexpr double kEpsDouble = kEps;
constexpr int64_t kRows = 5;
constexpr int64_t kWidth = 24;
// Below 2^-126 numbers are multiples of 2^-149: a few roundings of half of that.
constexpr double kSubnormal = 4 * 0x1p-150;

class Range : public ::testing::TestWithParam<float> {
 protected:
  Matrix Random(int64_t rows, int64_t columns, float scale = 1.0F) {
    return Matrix::Random(rows, columns, rng_, 0, scale);
  }
  float scale() const { return GetParam(); }

  KernelTest test_;
  std::mt19937 rng_{31};
};
INSTANTIATE_TEST_SUITE_P(Scales, Range,
                         ::testing::Values(1e-20F, 1e-10F, 1e-4F, 1.0F, 1e4F, 1e10F, 1e20F));

bool AllFinite(const Matrix& x) {
  for (const double value : x.values()) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

// The terms of the norm's backward pass, r w dn and x r^3 mean(w dn x), taken absolutely.
std::vector<double> NormGradientSize(int64_t rows, int64_t width, const std::vector<double>& dn,
                                     const std::vector<double>& x, const std::vector<double>& w) {
  std::vector<double> size(x.size());
  for (int64_t t = 0; t < rows; ++t) {
    double square = 0;
    double mean = 0;
    for (int64_t i = 0; i < width; ++i) {
      const auto at = static_cast<size_t>(t * width + i);
      square += x[at] * x[at];
      mean += std::abs(w[static_cast<size_t>(i)] * dn[at] * x[at]) / static_cast<double>(width);
    }
    const double r = 1 / std::sqrt(square / static_cast<double>(width) + kEpsDouble);
    for (int64_t i = 0; i < width; ++i) {
      const auto at = static_cast<size_t>(t * width + i);
      size[at] =
          std::abs(r * w[static_cast<size_t>(i)] * dn[at]) + r * r * r * mean * std::abs(x[at]);
    }
  }
  return size;
}

TEST_P(Range, RmsNorm) {
  // Gradients are small numbers: the loss is a mean over many tokens.
  for (const float gradient : {1.0F, 1e-6F}) {
    Matrix x = Random(kRows, kWidth, scale());
    Matrix weight = Random(1, kWidth);
    Matrix dy = Random(kRows, kWidth, gradient);
    Matrix y(kRows, kWidth), rstd(1, kRows), dx(kRows, kWidth);
    Matrix dweight = Matrix::Filled(1, kWidth, 0.0F);
    RmsNormForward(test_.ctx(), x.tensor(), weight.vector(), kEps, y.tensor(), rstd.vector());
    RmsNormBackward(test_.ctx(), dy.tensor(), x.tensor(), weight.vector(), rstd.vector(),
                    dx.tensor(), Write::kOverwrite, dweight.vector());
    const auto xd = x.values();
    const auto wd = weight.values();
    const auto dyd = dy.values();
    std::vector<double> expected(xd.size()), expected_dx(xd.size()), expected_dw(kWidth);
    reference::RmsNormForward(kRows, kWidth, xd.data(), wd.data(), kEpsDouble, expected.data(),
                              static_cast<double*>(nullptr));
    reference::RmsNormBackward(kRows, kWidth, dyd.data(), xd.data(), wd.data(), kEpsDouble,
                               expected_dx.data(), expected_dw.data());
    // The counts of roundings of rms_norm_test.cc.
    ExpectClose(y, expected,
                [&](size_t i) { return 3.01 * kF32Round * std::abs(expected[i]) + kSubnormal; });
    const auto size = NormGradientSize(kRows, kWidth, dyd, xd, wd);
    ExpectClose(dx, expected_dx, [&](size_t i) { return 10.1 * kF32Round * size[i] + kSubnormal; });
    ExpectClose(dweight, expected_dw, [&](size_t i) {
      double sum = 0;
      for (size_t t = 0; t < kRows; ++t)
        sum += std::abs(dyd[t * kWidth + i] * expected[t * kWidth + i] / wd[i]);
      return (4 + kRows) * kF32Round * sum + kSubnormal;
    });
  }
}

TEST_P(Range, QkNormRope) {
  constexpr int64_t kHeads = 2;
  constexpr int64_t kHeadWidth = kWidth / kHeads;
  for (const float gradient : {1.0F, 1e-6F}) {
    Matrix x = Random(kRows, kWidth, scale());
    Matrix weight = Random(1, kHeadWidth);
    Matrix dy = Random(kRows, kWidth, gradient);
    Matrix y(kRows, kWidth), rstd(kRows, kHeads), dx(kRows, kWidth);
    Matrix cos(kRows, kHeadWidth / 2), sin(kRows, kHeadWidth / 2);
    Matrix dweight = Matrix::Filled(1, kHeadWidth, 0.0F);
    const std::vector<int32_t> positions = {0, 1, 2, 700, 524287};
    RopeTable(test_.ctx(), ConstTensor(positions.data(), {kRows}), kHeadWidth, 10000.0F,
              cos.tensor(), sin.tensor());
    const auto heads = [](Matrix& m) { return m.tensor().AsHeads(kHeads, kHeadWidth); };
    QkNormRopeForward(test_.ctx(), heads(x), weight.vector(), kEps, cos.tensor(), sin.tensor(),
                      heads(y), rstd.tensor());
    QkNormRopeBackward(test_.ctx(), heads(dy), heads(x), weight.vector(), rstd.tensor(),
                       cos.tensor(), sin.tensor(), heads(dx), dweight.vector());
    const auto xd = x.values();
    const auto wd = weight.values();
    const auto dyd = dy.values();
    const auto tables = reference::MakeRopeTables(positions, kHeadWidth, 10000.0F);
    std::vector<double> expected(xd.size()), expected_dx(xd.size()), expected_dw(kHeadWidth);
    reference::QkNormRopeForward(kRows, kHeads, kHeadWidth, xd.data(), wd.data(), kEpsDouble,
                                 tables.cos.data(), tables.sin.data(), expected.data());
    reference::QkNormRopeBackward(kRows, kHeads, kHeadWidth, dyd.data(), xd.data(), wd.data(),
                                  kEpsDouble, tables.cos.data(), tables.sin.data(),
                                  expected_dx.data(), expected_dw.data());
    // A pair of channels shares its errors: 3 roundings of the norm, and of a table entry, a
    // product and a sum.
    double largest = 0;
    for (const double value : expected) largest = std::max(largest, std::abs(value));
    ExpectClose(y, expected, [&](size_t) { return 2 * 6 * kF32Round * largest + kSubnormal; });
    std::vector<double> dn(xd.size());
    reference::Rotate(kRows, kHeads, kHeadWidth, tables.cos.data(), tables.sin.data(), -1.0,
                      dyd.data(), dn.data());
    for (double& value : dn) value = std::abs(value) + 4 * static_cast<double>(gradient);
    const auto size = NormGradientSize(kRows * kHeads, kHeadWidth, dn, xd, wd);
    ExpectClose(dx, expected_dx,
                [&](size_t i) { return (10.1 + 3) * kF32Round * size[i] + kSubnormal; });
  }
}

TEST_P(Range, OutputGate) {
  for (const bool norm : {true, false}) {
    Matrix o = Random(kRows, kWidth, scale());
    Matrix z = Random(kRows, kWidth, scale());
    Matrix weight = Random(1, kWidth);
    Matrix dy = Random(kRows, kWidth, 1e-3F);
    Matrix y(kRows, kWidth), rstd(1, kRows), dout(kRows, kWidth), dz(kRows, kWidth);
    Matrix dweight = Matrix::Filled(1, kWidth, 0.0F);
    const sala::Tensor w = norm ? weight.vector() : sala::Tensor();
    OutputGateForward(test_.ctx(), o.tensor(), w, z.tensor(), kEps, y.tensor(), rstd.vector());
    OutputGateBackward(test_.ctx(), dy.tensor(), o.tensor(), w, z.tensor(), rstd.vector(),
                       dout.tensor(), dz.tensor(), norm ? dweight.vector() : sala::Tensor());
    const auto od = o.values();
    const auto zd = z.values();
    const auto dyd = dy.values();
    const auto wd = weight.values();
    std::vector<double> expected(od.size()), expected_do(od.size()), expected_dz(od.size());
    std::vector<double> expected_dw(kWidth);
    const double* weights = norm ? wd.data() : nullptr;
    reference::OutputGateForward(kRows, kWidth, od.data(), weights, zd.data(), kEpsDouble,
                                 expected.data());
    reference::OutputGateBackward(kRows, kWidth, dyd.data(), od.data(), weights, zd.data(),
                                  kEpsDouble, expected_do.data(), expected_dz.data(),
                                  expected_dw.data());
    // As output_gate_test.cc. A sigmoid below 2^-127 (z below -88) is 0: off by less than 2^-127.
    constexpr double kClosed = 0x1p-127;
    std::vector<double> normed(od.size());
    reference::OutputGateForward<double>(kRows, kWidth, od.data(), weights, nullptr, kEpsDouble,
                                         normed.data());
    ExpectClose(y, expected, [&](size_t i) {
      return 10.1 * kF32Round * std::abs(expected[i]) + kClosed * std::abs(normed[i]) + kSubnormal;
    });
    ExpectClose(dz, expected_dz, [&](size_t i) {
      return 20 * kF32Round * std::abs(dyd[i] * expected[i]) +
             kClosed * std::abs(dyd[i] * normed[i]) + kSubnormal;
    });
    const auto size = norm ? NormGradientSize(kRows, kWidth, dyd, od, wd) : dyd;
    ExpectClose(dout, expected_do,
                [&](size_t i) { return 17 * kF32Round * std::abs(size[i]) + kSubnormal; });
    EXPECT_TRUE(AllFinite(dweight) || !norm);
  }
}

TEST_P(Range, SwiGlu) {
  // One branch large, then the other. Both at 1e20 overflow: 1e40 is no float32.
  for (const bool large_gate : {true, false}) {
    Matrix gate = Random(kRows, kWidth, large_gate ? scale() : 1.0F);
    Matrix up = Random(kRows, kWidth, large_gate ? 1.0F : scale());
    Matrix dy = Random(kRows, kWidth, 1e-3F);
    Matrix y(kRows, kWidth), dgate(kRows, kWidth), dup(kRows, kWidth);
    SwiGluForward(test_.ctx(), gate.tensor(), up.tensor(), y.tensor());
    SwiGluBackward(test_.ctx(), dy.tensor(), gate.tensor(), up.tensor(), dgate.tensor(),
                   dup.tensor());
    const auto g = gate.values();
    const auto u = up.values();
    const auto d = dy.values();
    const auto n = static_cast<int64_t>(g.size());
    std::vector<double> expected(g.size()), expected_dgate(g.size()), expected_dup(g.size());
    reference::SwiGluForward(n, g.data(), u.data(), expected.data());
    reference::SwiGluBackward(n, d.data(), g.data(), u.data(), expected_dgate.data(),
                              expected_dup.data());
    // The counts of swiglu_test.cc; a sigmoid below 2^-127 is 0, and then |gate| < 2^10 times it
    // anything that matters.
    constexpr double kClosed = 0x1p-117;
    ExpectClose(y, expected, [&](size_t i) {
      return 10 * kF32Round * std::abs(expected[i]) + kClosed * std::abs(u[i]) + kSubnormal;
    });
    ExpectClose(dup, expected_dup, [&](size_t i) {
      return 10 * kF32Round * std::abs(expected_dup[i]) + kClosed * std::abs(d[i]) + kSubnormal;
    });
    ExpectClose(dgate, expected_dgate, [&](size_t i) {
      const double s = reference::Sigmoid(g[i]);
      const double terms = s + std::abs(g[i] * s * (1 - s)) + std::abs(g[i]) * s * kF32Round;
      return (20 * kF32Round * terms + kClosed) * std::abs(d[i] * u[i]) + kSubnormal;
    });
  }
}

TEST(RangeLimits, SwiGluOverflowIsNotHidden) {
  KernelTest test;
  Matrix gate = Matrix::Filled(1, 1, 1e20F);
  Matrix up = Matrix::Filled(1, 1, -1e20F);
  Matrix y(1, 1);
  SwiGluForward(test.ctx(), gate.tensor(), up.tensor(), y.tensor());
  EXPECT_EQ(y.at(0, 0), -std::numeric_limits<float>::infinity());
}

TEST_P(Range, CrossEntropyOfLogits) {
  constexpr int64_t kVocabulary = 19;
  Matrix hidden = Random(kRows, kWidth, scale());
  Matrix weight = Random(kVocabulary, kWidth);
  Matrix dhidden(kRows, kWidth), dweight = Matrix::Filled(kVocabulary, kWidth, 0.0F);
  const std::vector<int32_t> labels = {0, 18, -1, 3, 7};
  const CrossEntropyResult found = CrossEntropy(
      test_.ctx(), hidden.tensor(), weight.tensor(), ConstTensor(labels.data(), {kRows}),
      {.logit_scale = 1.0F, .grad_scale = 1.0F}, {}, dhidden.tensor(), dweight.tensor());
  const auto h = hidden.values();
  const auto w = weight.values();
  const double expected = reference::CrossEntropyForward(kRows, kWidth, kVocabulary, 1.0, h.data(),
                                                         w.data(), labels.data());
  // As cross_entropy_test.cc: the logits' error twice a token, 84 roundings of exp and its sum.
  const double logit_error = LogitError(hidden, weight, 1.0);
  EXPECT_NEAR(found.loss_sum, expected, kRows * (2 * logit_error + 84 * kF32Round));
  EXPECT_TRUE(AllFinite(dhidden) && AllFinite(dweight));
  std::vector<double> expected_dhidden(h.size()), expected_dweight(w.size());
  reference::CrossEntropyBackward(kRows, kWidth, kVocabulary, 1.0, 1.0, h.data(), w.data(),
                                  labels.data(), expected_dhidden.data(), expected_dweight.data());
  // Probabilities are off by the relative error e^(2 logit_error) - 1, at most 1.
  const double p_error = std::min(1.0, std::expm1(2 * logit_error) + 84 * kF32Round);
  if (p_error < 1e-3) {
    ExpectClose(dhidden, expected_dhidden, [&](size_t) {
      return (p_error + (kVocabulary + 2) * kF32Round) * 2 * 4;  // sum |p - onehot| <= 2, |w| < 4
    });
  }
}

TEST_P(Range, KlDivergenceOfLogits) {
  constexpr int64_t kVocabulary = 19;
  Matrix teacher = Random(kRows, kWidth, scale());
  Matrix student = Random(kRows, kWidth, scale());
  Matrix teacher_weight = Random(kVocabulary, kWidth);
  Matrix student_weight = Random(kVocabulary, kWidth);
  Matrix dhidden(kRows, kWidth), dweight = Matrix::Filled(kVocabulary, kWidth, 0.0F);
  const KlDivergenceResult found =
      KlDivergence(test_.ctx(), teacher.tensor(), teacher_weight.tensor(), student.tensor(),
                   student_weight.tensor(), {}, dhidden.tensor(), dweight.tensor());
  const auto logits = [](const Matrix& x, const Matrix& weight) {
    return reference::Logits(kRows, kWidth, kVocabulary, 1.0, x.values().data(),
                             weight.values().data());
  };
  const auto p = logits(teacher, teacher_weight);
  const auto q = logits(student, student_weight);
  const double expected =
      reference::KlDivergenceForward(kRows, kVocabulary, 1.0, p.data(), q.data());
  // The error of the logits counts twice for either model, and once more through p times the
  // difference of the log-probabilities where p is not yet one-hot; exp and sums as above.
  const double logit_error =
      LogitError(teacher, teacher_weight, 1.0) + LogitError(student, student_weight, 1.0);
  double spread = 0;
  for (size_t i = 0; i < p.size(); ++i) spread = std::max(spread, std::abs(p[i]) + std::abs(q[i]));
  const double p_error = std::min(1.0, std::expm1(2 * logit_error) + 84 * kF32Round);
  if (p_error < 1e-3 || scale() >= 1e10F) {
    const double through_p = scale() >= 1e10F ? 0 : p_error * 4 * (spread + 3);
    EXPECT_NEAR(found.loss_sum, expected, kRows * (2 * logit_error + through_p + 84 * kF32Round));
  }
  EXPECT_TRUE(std::isfinite(found.loss_sum));
  EXPECT_TRUE(AllFinite(dhidden) && AllFinite(dweight));
}

// Logits beyond float32: the loss says so.
TEST(RangeLimits, LogitsThatOverflowGiveNoFiniteLoss) {
  KernelTest test;
  Matrix hidden = Matrix::Filled(1, 2, 1e25F);
  Matrix weight = Matrix::Filled(3, 2, 1e25F);
  const int32_t label = 1;
  const CrossEntropyResult found =
      CrossEntropy(test.ctx(), hidden.tensor(), weight.tensor(), ConstTensor(&label, {1}),
                   {.logit_scale = 1.0F, .grad_scale = 1.0F}, {}, {}, {});
  EXPECT_FALSE(std::isfinite(found.loss_sum));
}

TEST_P(Range, SquaredError) {
  Matrix y = Random(kRows, kWidth, scale());
  Matrix target = Random(kRows, kWidth, scale());
  Matrix dy(kRows, kWidth);
  const MseResult found =
      MeanSquaredError(test_.ctx(), y.tensor(), target.tensor(), 0.5F, dy.tensor());
  const auto a = y.values();
  const auto b = target.values();
  const auto n = static_cast<int64_t>(a.size());
  const double expected = reference::SquaredError(n, a.data(), b.data());
  // Differences are rounded once, then float64: 1e40 is in range.
  EXPECT_NEAR(found.squared_error, expected, 4 * kF32Round * expected);
  std::vector<double> expected_dy(a.size());
  reference::SquaredErrorBackward(n, a.data(), b.data(), 0.5, expected_dy.data());
  ExpectClose(dy, expected_dy,
              [&](size_t i) { return 3 * kF32Round * std::abs(expected_dy[i]) + kSubnormal; });
}

// Small queries and keys: scores vanish, and a token gets the mean of the values before it. Large
// ones: q.k up to 1e36 is in range, and a token gets the value of its best key.
TEST_P(Range, Attention) {
  const float side = std::min(scale(), 1e17F);
  AttentionCase c(33, {2, 1, 8});
  c.q = Random(33, 16, side);
  c.k = Random(33, 8, side);
  c.v = Random(33, 8, scale());
  c.Dense(test_.ctx(), {{0, c.t}});
  const auto shape = c.Shape();
  const auto v = c.v.values();
  const auto expected = reference::AttentionForward(shape, c.q.values(), c.k.values(), v);
  const AttentionBounds bounds(shape, c.q.values(), c.k.values(), v);
  // Beyond 1e4 the error of a score is no longer small, but the best key leads by more than it.
  const double allowed =
      side > 1e3F ? c.t * kF32Round * bounds.Out() / bounds.OutFactor() : bounds.Out();
  ExpectClose(c.out, expected.out, [&](size_t) { return allowed; });
  for (const Matrix* result : c.Results()) EXPECT_TRUE(AllFinite(*result));
}

// A score that is no float32 makes its own row NaN, which reaches the loss.
TEST(RangeLimits, ScoresThatOverflowAreNan) {
  KernelTest test;
  AttentionCase c(3, {1, 1, 8});
  for (int64_t i = 0; i < 8; ++i) {
    c.q.at(2, i) = 1e20F;
    c.k.at(1, i) = 1e20F;
  }
  c.Dense(test.ctx(), {{0, 3}});
  for (int64_t i = 0; i < 8; ++i) {
    EXPECT_TRUE(std::isfinite(c.out.at(1, i)));
    EXPECT_TRUE(std::isnan(c.out.at(2, i)));
  }
}

TEST_P(Range, Lightning) {
  constexpr int64_t kTokens = 70;  // more than a chunk
  constexpr int64_t kHeads = 2;
  constexpr int64_t kHeadWidth = 6;
  const std::vector<float> slopes = LightningSlopes(kHeads);
  const std::vector<int32_t> cu_seqlens = {0, kTokens};
  for (const bool large_values : {true, false}) {
    // q.k of two large ones would be 1e40.
    Matrix q = Random(kTokens, kHeads * kHeadWidth);
    Matrix k = Random(kTokens, kHeads * kHeadWidth, large_values ? 1.0F : scale());
    Matrix v = Random(kTokens, kHeads * kHeadWidth, large_values ? scale() : 1.0F);
    Matrix dout = Random(kTokens, kHeads * kHeadWidth, 1e-3F);
    Matrix out(kTokens, kHeads * kHeadWidth);
    Matrix dq(kTokens, kHeads * kHeadWidth), dk(kTokens, kHeads * kHeadWidth),
        dv(kTokens, kHeads * kHeadWidth);
    const auto heads = [](Matrix& m) { return m.tensor().AsHeads(kHeads, kHeadWidth); };
    const float scaling = 1.0F / std::sqrt(static_cast<float>(kHeadWidth));
    LightningForward(test_.ctx(), heads(q), heads(k), heads(v), cu_seqlens, slopes, scaling, {},
                     heads(out), {});
    LightningBackward(test_.ctx(), heads(q), heads(k), heads(v), heads(dout), cu_seqlens, slopes,
                      scaling, {}, {}, heads(dq), heads(dk), heads(dv), {});
    const reference::LightningShape shape{.n = kTokens,
                                          .heads = kHeads,
                                          .d = kHeadWidth,
                                          .scale = static_cast<double>(scaling),
                                          .slopes = {slopes.begin(), slopes.end()}};
    const auto absolute = [](const Matrix& m) {
      std::vector<double> values = m.values();
      for (double& value : values) value = std::abs(value);
      return values;
    };
    const auto value =
        reference::LightningForward<double>(shape, q.values(), k.values(), v.values(), {});
    const auto size =
        reference::LightningForward<double>(shape, absolute(q), absolute(k), absolute(v), {});
    const auto grad = reference::LightningBackward(shape, q.values(), k.values(), v.values(),
                                                   dout.values(), {}, {});
    const auto grad_size = reference::LightningBackward(shape, absolute(q), absolute(k),
                                                        absolute(v), absolute(dout), {}, {});
    // lightning_test.cc, ErrorFactor: two chunks.
    constexpr double kFactor = (2 * kHeadWidth + 2 * 64 + 4 * 4 + 8) * kF32Round;
    const auto bound = [](const std::vector<double>& terms) {
      return [&terms](size_t i) { return kFactor * terms[i] + kSubnormal; };
    };
    ExpectClose(out, value.out, bound(size.out));
    ExpectClose(dq, grad.dq, bound(grad_size.dq));
    ExpectClose(dk, grad.dk, bound(grad_size.dk));
    ExpectClose(dv, grad.dv, bound(grad_size.dv));
  }
}

}  // namespace
}  // namespace sala::kernels
