#include "kernels/common/vectorized.h"

#include <cmath>
#include <limits>

#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

TEST(VectorMath, ExpIsWithinTwoUnitsInTheLastPlace) {
  constexpr double kUlp = 0x1p-23;  // of a normal float32, relative, at most
  for (double x = -87.3; x < 88.7; x += 0.000317) {
    const auto argument = static_cast<float>(x);
    const double exact = std::exp(static_cast<double>(argument));
    ASSERT_NEAR(Exp(argument), exact, 2 * kUlp * exact) << argument;
  }
}

TEST(VectorMath, ExpUnderflowsGraduallyAndOverflowsToInfinity) {
  for (float x = -104.0F; x < -87.3F; x += 0.01F) {
    // One unit of the smallest subnormal, besides the relative error.
    const double exact = std::exp(static_cast<double>(x));
    ASSERT_NEAR(Exp(x), exact, 0x1p-149 + 0x1p-22 * exact) << x;
  }
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Exp(-inf), 0.0F);
  EXPECT_EQ(Exp(-1e30F), 0.0F);
  EXPECT_EQ(Exp(-105.0F), 0.0F);
  EXPECT_EQ(Exp(88.8F), inf);
  EXPECT_EQ(Exp(1e30F), inf);
  EXPECT_EQ(Exp(inf), inf);
  EXPECT_TRUE(std::isnan(Exp(std::numeric_limits<float>::quiet_NaN())));
  EXPECT_EQ(Exp(0.0F), 1.0F);
}

TEST(VectorMath, SigmoidAgreesWithDouble) {
  for (float x = -80.0F; x < 80.0F; x += 0.013F) {
    const double exact = 1 / (1 + std::exp(-static_cast<double>(x)));
    // Exp's two units (four roundings), the addition and the division.
    ASSERT_NEAR(Sigmoid(x), exact, 6 * kF32Round * exact) << x;
  }
  EXPECT_EQ(Sigmoid(-std::numeric_limits<float>::infinity()), 0.0F);
  EXPECT_EQ(Sigmoid(std::numeric_limits<float>::infinity()), 1.0F);
}

SALA_INLINE void ExpLoopBody(int64_t n, const float* x, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = Exp(x[i]);
}
constexpr Vectorized<ExpLoopBody> ExpLoop{};

TEST(VectorMath, ALoopHasTheBitsOfSingleCalls) {
  std::mt19937 rng(3);
  Matrix x = Matrix::Random(1, 1003, rng, 0, 30.0F);
  Matrix y(1, 1003);
  ExpLoop(1003, x.tensor().Data<float>(), y.tensor().Data<float>());
  for (int64_t i = 0; i < 1003; ++i) {
    volatile float argument = x.at(0, i);  // keeps the compiler from vectorising this call too
    ASSERT_EQ(y.at(0, i), Exp(argument)) << argument;
  }
}

TEST(VectorMath, LaneSumAddsEveryTermOnce) {
  for (int64_t n : EdgeSizes()) {
    const auto sum = LaneSum<double>(n, [](int64_t i) { return static_cast<double>(i + 1); });
    EXPECT_EQ(sum, static_cast<double>(n * (n + 1) / 2));
  }
}

}  // namespace
}  // namespace sala::kernels
