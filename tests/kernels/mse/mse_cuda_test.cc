#include "kernels/mse/mse.h"
#include "kernels/mse/reference.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using MseCuda = CudaKernelTest;

struct Case {
  int64_t tokens, width;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int64_t tokens : EdgeSizes()) {
    if (kSlowBuild && tokens > 33) break;
    cases.push_back({tokens, 72});
  }
  cases.push_back({3, 8});
  cases.push_back({5, 2056});
  if (!kSlowBuild) cases.push_back({150, 4096});  // several blocks
  return cases;
}

TEST_F(MseCuda, AgreesWithReference) {
  std::mt19937 rng(71);
  for (const auto& [tokens, width] : Cases()) {
    const Matrix y = RandomBf16(tokens, width, rng);
    const Matrix target = RandomBf16(tokens, width, rng, 2.0F);
    const DeviceMatrix dev_y(DType::kBF16, y, 8), dev_target(DType::kBF16, target, 16),
        dy(DType::kBF16, tokens, width, 8);
    const MseResult result =
        MeanSquaredError(ctx(), dev_y.tensor(), dev_target.tensor(), 0.375F, dy.tensor());
    const auto yd = y.values();
    const auto td = target.values();
    const int64_t n = tokens * width;
    // Sums in double: n roundings relative to the sum of absolute terms, here and in the reference.
    const double round = 2 * static_cast<double>(n + 2) * 0x1p-53;
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
    EXPECT_NEAR(result.target_sum, sum, round * absolute);
    EXPECT_NEAR(result.target_square, square, round * square);
    EXPECT_EQ(result.elements, n);
    std::vector<double> expected(yd.size());
    reference::SquaredErrorBackward(n, yd.data(), td.data(), 0.375, expected.data());
    // The difference of two bfloat16 is rounded to float32, relative to itself, and the product.
    ExpectClose(dy.Download(), expected, RoundedOnce(expected));
    EXPECT_TRUE(dy.GapsUntouched());
    const MseResult again =
        MeanSquaredError(ctx(), dev_y.tensor(), dev_target.tensor(), 0.375F, {});
    EXPECT_EQ(again.squared_error, result.squared_error);
    EXPECT_EQ(again.target_sum, result.target_sum);
    EXPECT_EQ(again.target_square, result.target_square);
  }
}

}  // namespace
}  // namespace sala::kernels
