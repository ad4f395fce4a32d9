#include "kernels/adamw/adamw.h"

#include "kernels/adamw/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

TEST(AdamW, FollowsTheDoubleReferenceOverManySteps) {
  constexpr int kSteps = 200;
  std::mt19937 rng(10);
  for (double weight_decay : {0.0, 0.1}) {
    for (int64_t n : {1, 33, 127}) {
      Matrix param = Matrix::Random(1, n, rng);
      Matrix m = Matrix::Filled(1, n, 0);
      Matrix v = Matrix::Filled(1, n, 0);
      auto pd = param.values();
      auto md = m.values();
      auto vd = v.values();
      const auto largest_start = *std::max_element(
          pd.begin(), pd.end(), [](double a, double b) { return std::abs(a) < std::abs(b); });
      AdamWOptions options;
      options.weight_decay = weight_decay;
      options.grad_scale = 0.5;
      KernelTest test;
      for (int step = 1; step <= kSteps; ++step) {
        options.step = step;
        options.learning_rate = 0.01 * (1 + step % 3);
        Matrix grad = Matrix::Random(1, n, rng);
        const auto gd = grad.values();
        AdamWStep(test.ctx(), param.vector(), grad.vector(), m.vector(), v.vector(), options);
        reference::AdamWStep(n, gd.data(), pd.data(), md.data(), vd.data(), options);
      }
      // A moment is a weighted mean of at most ~1 / (1 - b) terms of size <= 4 (normal gradients,
      // halved), and forgets its roundings at the same rate: 4 roundings a step over 1 / (1 - b)
      // steps.
      ExpectClose(m, md, [&](size_t) { return 4 * 10 * kF32Round * 4; });
      ExpectClose(v, vd, [&](size_t i) { return 4 * 20 * kF32Round * vd[i] + 1e-12; });
      // Each step rounds the parameter (its size at most start + steps * 0.03) a few times; the
      // step itself, at most 0.03 * 4, carries the moments' relative errors (40 + 80 roundings).
      const double largest = std::abs(largest_start) + kSteps * 0.03;
      ExpectClose(param, pd,
                  [&](size_t) { return kSteps * kF32Round * (3 * largest + 120 * 0.03 * 4); });
    }
  }
}

TEST(AdamW, DecaysWithoutGradientAndIgnoresThreads) {
  std::mt19937 rng(12);
  const int64_t n = 40000;
  Matrix start = Matrix::Random(1, n, rng);
  Matrix grad = Matrix::Filled(1, n, 0);
  AdamWOptions options;
  options.learning_rate = 0.5;
  options.weight_decay = 0.25;
  Matrix results[2] = {start, start};
  for (int i = 0; i < 2; ++i) {
    Matrix m = Matrix::Filled(1, n, 0);
    Matrix v = Matrix::Filled(1, n, 0);
    KernelTest test(1 + 2 * i);
    AdamWStep(test.ctx(), results[i].vector(), grad.vector(), m.vector(), v.vector(), options);
  }
  EXPECT_TRUE(results[0].SameBits(results[1]));
  // lr wd = 1/8 is exact: p - p / 8, one rounding each.
  for (int64_t i = 0; i < n; ++i) {
    ASSERT_EQ(results[0].at(0, i), start.at(0, i) - 0.125F * start.at(0, i));
  }
}

TEST(AdamW, TheFirstStepHasTheSizeOfTheLearningRate) {
  Matrix param = Matrix::Filled(1, 2, 1.0F);
  Matrix grad = Matrix::Filled(1, 2, 3.0F);
  grad.at(0, 1) = -1e-3F;
  Matrix m = Matrix::Filled(1, 2, 0), v = Matrix::Filled(1, 2, 0);
  AdamWOptions options;
  options.learning_rate = 0.125;
  options.eps = 0;
  KernelTest test;
  AdamWStep(test.ctx(), param.vector(), grad.vector(), m.vector(), v.vector(), options);
  // m-hat / sqrt(v-hat) = sign(g) within some ten roundings.
  EXPECT_NEAR(param.at(0, 0), 1.0 - 0.125, 10 * kF32Round);
  EXPECT_NEAR(param.at(0, 1), 1.0 + 0.125, 10 * kF32Round);
}

}  // namespace
}  // namespace sala::kernels
