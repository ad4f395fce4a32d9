#include "kernels/logit_scale/logit_scale.h"

#include "kernels/logit_scale/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

// What the kernel makes of a single 1 at `position`.
double ScaleAt(int32_t position, double a) {
  KernelTest test;
  float one = 1.0F;
  LogitScaleForward(test.ctx(), sala::Tensor(&position, {1}), a, sala::Tensor(&one, {1, 1, 1}));
  return one;
}

// The values of the published method, given there to six decimals; a float32 in [1, 2) is half of
// 2^-23 off.
TEST(LogitScale, GoldenValues) {
  constexpr double kTolerance = 0.5e-6 + 0x1p-24;
  EXPECT_EQ(ScaleAt(0, 500), 1.0);
  EXPECT_NEAR(ScaleAt(511, 500), 1.113295, kTolerance);
  EXPECT_NEAR(ScaleAt(4095, 500), 1.356920, kTolerance);
  EXPECT_NEAR(ScaleAt(16383, 500), 1.566320, kTolerance);
  EXPECT_NEAR(ScaleAt(131071, 500), 1.896709, kTolerance);
  EXPECT_NEAR(ScaleAt(131071, 900), 1.733263, kTolerance);
}

// A query lies in the fused projection's rows, beside columns that must not change. Positions
// restart at documents: here they are not the row numbers.
TEST(LogitScale, AgreesWithReferenceInPlace) {
  constexpr int64_t kHeads = 3;
  constexpr int64_t kHeadDim = 5;
  constexpr double kA = 362;
  std::mt19937 rng(11);
  for (int64_t tokens : EdgeSizes()) {
    Matrix q = Matrix::Random(tokens, kHeads * kHeadDim, rng, 4);
    std::vector<int32_t> positions;
    for (int32_t t = 0; t < tokens; ++t) positions.push_back(t % 50 * 1000);
    std::vector<double> expected = q.values();
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] *= reference::LogitScale(positions[i / (kHeads * kHeadDim)], kA);
    }
    KernelTest test;
    LogitScaleForward(test.ctx(), sala::Tensor(positions.data(), {tokens}), kA,
                      q.tensor().AsHeads(kHeads, kHeadDim));
    // One rounding of the scale, one of the product.
    ExpectClose(q, expected, [&](size_t i) { return 2.01 * kF32Round * std::abs(expected[i]); });
    EXPECT_TRUE(q.GapsUntouched());
  }
}

// More rows than one piece of the kernel's loop.
TEST(LogitScale, ThreadsDoNotChangeBits) {
  constexpr int64_t kTokens = 600;
  std::mt19937 rng(12);
  Matrix a = Matrix::Random(kTokens, 6, rng);
  Matrix b = a;
  std::vector<int32_t> positions(kTokens);
  for (int32_t t = 0; t < kTokens; ++t) positions[static_cast<size_t>(t)] = t;
  const sala::Tensor position(positions.data(), {kTokens});
  KernelTest one(1);
  KernelTest three(3);
  LogitScaleForward(one.ctx(), position, 500, a.tensor().AsHeads(2, 3));
  LogitScaleForward(three.ctx(), position, 500, b.tensor().AsHeads(2, 3));
  EXPECT_TRUE(a.SameBits(b));
}

TEST(LogitScaleDeathTest, RunsOnTheCpuOnly) {
  Matrix q(1, 8);
  std::vector<int32_t> positions = {0};
  EXPECT_DEATH(LogitScaleForward({.device = DeviceKind::kCuda}, ConstTensor(positions.data(), {1}),
                                 600.0, q.tensor().AsHeads(1, 8)),
               "the logit scale is part of inference, which runs on the CPU only");
}

}  // namespace
}  // namespace sala::kernels
