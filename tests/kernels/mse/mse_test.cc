#include "kernels/mse/mse.h"

#include "kernels/mse/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

TEST(MeanSquaredError, AgreesWithReference) {
  std::mt19937 rng(8);
  for (int64_t tokens : EdgeSizes()) {
    const int64_t width = 21;
    Matrix y = Matrix::Random(tokens, width, rng, 2);
    Matrix target = Matrix::Random(tokens, width, rng, 1, 2.0F);
    Matrix dy(tokens, width, 3);
    KernelTest test;
    const MseResult result =
        MeanSquaredError(test.ctx(), y.tensor(), target.tensor(), 0.375F, dy.tensor());
    const auto yd = y.values();
    const auto td = target.values();
    const int64_t n = tokens * width;
    // Sums in double: n roundings relative to the sum of absolute terms.
    const double round = static_cast<double>(n + 2) * 0x1p-53;
    const double error = reference::SquaredError(n, yd.data(), td.data());
    EXPECT_NEAR(result.squared_error, error, round * error);
    double sum = 0;
    double absolute = 0;
    double square = 0;
    for (double t : td) {
      sum += t;
      absolute += std::abs(t);
      square += t * t;
    }
    EXPECT_NEAR(result.target_sum, sum, 2 * round * absolute);
    EXPECT_NEAR(result.target_square, square, 2 * round * square);
    EXPECT_EQ(result.elements, n);
    std::vector<double> expected(yd.size());
    reference::SquaredErrorBackward(n, yd.data(), td.data(), 0.375, expected.data());
    // A difference and a product; 2 * 0.375 is exact.
    ExpectClose(dy, expected, [&](size_t i) { return 2.01 * kF32Round * std::abs(expected[i]); });
    EXPECT_TRUE(dy.GapsUntouched());
    const MseResult no_gradient =
        MeanSquaredError(test.ctx(), y.tensor(), target.tensor(), 0.375F, {});
    EXPECT_EQ(no_gradient.squared_error, result.squared_error);
  }
}

TEST(MeanSquaredError, ReferenceBackwardEqualsComplexStep) {
  std::mt19937 rng(9);
  const auto y = Matrix::Random(1, 8, rng).values();
  const auto target = Matrix::Random(1, 8, rng).values();
  std::vector<double> dy(8);
  reference::SquaredErrorBackward(8, y.data(), target.data(), 1.5, dy.data());
  ExpectSameGradient(dy, ComplexStep(y, [&](const auto& z) {
                       return 1.5 * reference::SquaredError(8, z.data(), target.data());
                     }));
}

}  // namespace
}  // namespace sala::kernels
