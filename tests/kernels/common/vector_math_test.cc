#include "kernels/common/vectorized.h"

#include <bit>
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

TEST(VectorMath, ALoopHasTheBitsOfSingleCallsInEveryInstructionSet) {
  std::mt19937 rng(3);
  Matrix x = Matrix::Random(1, 1003, rng, 0, 30.0F);
  for (const InstructionSet set : SupportedInstructionSets()) {
    SetInstructionSetForTesting(set);
    Matrix y(1, 1003);
    ExpLoop(1003, x.tensor().Data<float>(), y.tensor().Data<float>());
    for (int64_t i = 0; i < 1003; ++i) {
      volatile float argument = x.at(0, i);  // keeps the compiler from vectorising this call too
      ASSERT_EQ(y.at(0, i), Exp(argument)) << NameOf(set) << " " << argument;
    }
  }
  SetInstructionSetForTesting(SupportedInstructionSets().back());
}

TEST(VectorMath, LaneSumAddsEveryTermOnce) {
  for (int64_t n : EdgeSizes()) {
    const auto sum = LaneSum<double>(n, [](int64_t i) { return static_cast<double>(i + 1); });
    EXPECT_EQ(sum, static_cast<double>(n * (n + 1) / 2));
  }
}

// Against the instruction, or the C library where there is none. Exponents near each other, so that
// sums cancel, tie and lose bits; subnormal numbers and infinities come from any bits.
TEST(VectorMath, FusedMultiplyAddRoundsOnce) {
  std::mt19937 rng(5);
  const auto any = [&rng] { return std::bit_cast<float>(static_cast<uint32_t>(rng())); };
  const auto near = [&rng](int spread) {
    const auto exponent = static_cast<uint32_t>(
        127 - spread + static_cast<int>(rng() % (2 * static_cast<uint32_t>(spread) + 1)));
    // Few bits, so that products end in the middle of two float32 numbers.
    const uint32_t mask = rng() % 2 == 0 ? 0x7fffffU : 0x7ff000U;
    return std::bit_cast<float>((static_cast<uint32_t>(rng()) & (0x80000000U | mask)) | exponent
                                                                                            << 23);
  };
  for (int i = 0; i < 2000000; ++i) {
    const bool wild = i % 4 == 0;
    const float a = wild ? any() : near(2);
    const float b = wild ? any() : near(2);
    const float c = wild ? any() : near(26);
    const float expected = std::fma(a, b, c);
    const float found = FusedMultiplyAdd(a, b, c);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(found)) << a << " " << b << " " << c;
    } else {
      ASSERT_EQ(std::bit_cast<uint32_t>(found), std::bit_cast<uint32_t>(expected))
          << std::hexfloat << a << " " << b << " " << c;
    }
  }
  // Just above and just below the middle of two float32 numbers, and results below the normal
  // range.
  for (const float tail : {0x1p-60F, -0x1p-60F, 0.0F}) {
    EXPECT_EQ(FusedMultiplyAdd(1 + 0x1p-12F, 1 + 0x1p-12F, tail),
              std::fma(1 + 0x1p-12F, 1 + 0x1p-12F, tail));
    EXPECT_EQ(FusedMultiplyAdd(0x1.8p-100F, 0x1.0p-49F, tail * 0x1p-89F),
              std::fma(0x1.8p-100F, 0x1.0p-49F, tail * 0x1p-89F));
  }
}

}  // namespace
}  // namespace sala::kernels
