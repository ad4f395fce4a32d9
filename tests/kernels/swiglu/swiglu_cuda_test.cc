#include "kernels/swiglu/reference.h"
#include "kernels/swiglu/swiglu.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {
namespace {

using SwiGluCuda = CudaKernelTest;

// The result is rounded once to bfloat16; the float32 arithmetic before it (exp with 2 units, a
// division, products) is below a hundredth of that.
constexpr double kRounding = 1.01 * kBf16Round;
// Smallest normal bfloat16: results below it may be rounded to a multiple of the subnormal step.
constexpr double kTiny = 1e-38;

TEST_F(SwiGluCuda, AgreesWithReference) {
  std::mt19937 rng(2);
  std::vector<std::pair<int64_t, int64_t>> cases;
  for (int64_t tokens : EdgeSizes()) {
    for (int64_t width : {8, 72, 320}) cases.emplace_back(tokens, width);
  }
  if (!kSlowBuild) cases.emplace_back(450, 328);  // more packs than a grid has threads
  for (const auto& [tokens, width] : cases) {
    const Matrix gate = RandomBf16(tokens, width, rng, 3.0F);
    const Matrix up = RandomBf16(tokens, width, rng);
    const Matrix dy = RandomBf16(tokens, width, rng);
    const DeviceMatrix g(DType::kBF16, gate, 8), u(DType::kBF16, up, 16), d(DType::kBF16, dy, 8);
    const DeviceMatrix y(DType::kBF16, tokens, width, 24), dgate(DType::kBF16, tokens, width, 8),
        dup(DType::kBF16, tokens, width);
    SwiGluForward(ctx(), g.tensor(), u.tensor(), y.tensor());
    SwiGluBackward(ctx(), d.tensor(), g.tensor(), u.tensor(), dgate.tensor(), dup.tensor());

    const auto gv = gate.values();
    const auto uv = up.values();
    const auto dv = dy.values();
    const auto n = static_cast<int64_t>(gv.size());
    std::vector<double> expected(gv.size()), expected_dgate(gv.size()), expected_dup(gv.size());
    reference::SwiGluForward(n, gv.data(), uv.data(), expected.data());
    reference::SwiGluBackward(n, dv.data(), gv.data(), uv.data(), expected_dgate.data(),
                              expected_dup.data());
    const auto rounding = [](const std::vector<double>& size) {
      return [&size](size_t i) { return kRounding * std::abs(size[i]) + kTiny; };
    };
    ExpectClose(y.Download(), expected, rounding(expected));
    ExpectClose(dup.Download(), expected_dup, rounding(expected_dup));
    // 1 + g (1 - s) may cancel: float32 rounding of its terms remains.
    ExpectClose(dgate.Download(), expected_dgate, [&](size_t i) {
      return kRounding * std::abs(expected_dgate[i]) +
             16 * kF32Round * std::abs(dv[i] * uv[i]) * (1 + std::abs(gv[i])) + kTiny;
    });
    EXPECT_TRUE(y.GapsUntouched() && dgate.GapsUntouched() && dup.GapsUntouched());

    SwiGluBackward(ctx(), d.tensor(), g.tensor(), u.tensor(), g.tensor(), u.tensor());
    EXPECT_TRUE(g.Download().SameBits(dgate.Download()));
    EXPECT_TRUE(u.Download().SameBits(dup.Download()));
  }
}

}  // namespace
}  // namespace sala::kernels
