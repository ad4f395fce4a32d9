#include "kernels/rms_norm/reference.h"
#include "kernels/rms_norm/rms_norm.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using RmsNormCuda = CudaKernelTest;

constexpr float kEps = 1e-5F;
constexpr double kEpsDouble = kEps;

// A sum over a row passes at most 32 values in a thread, 5 steps of a butterfly and 16 warps: that
// many float32 roundings, relative to the sum of absolute terms.
constexpr double kRowSum = 32 + 5 + 16;

struct Case {
  int64_t tokens, width;
  float scale = 2.0F;  // of x
};

// The token counts that every row-wise operation is tried with, widths of one warp and of several,
// and the limits of the ways a row is cut: two packs a thread up to 8192, then four.
std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int64_t tokens : EdgeSizes()) {
    if (kSlowBuild && tokens > 33) break;
    for (int64_t width : {8, 72, 1032}) {
      if (!kSlowBuild || width == 72 || tokens <= 1) cases.push_back({tokens, width});
    }
  }
  // Squares that leave float32: the sum of some rows, each one, and inputs near its largest number.
  for (float scale : {0x1p61F, 0x1p67F, 0x1p120F}) cases.push_back({5, 72, scale});
  cases.push_back({3, 8192});
  cases.push_back({2, 8200});
  if (kSlowBuild) return cases;
  cases.push_back({2, 1032, 0x1p67F});
  cases.push_back({2, 8200, 0x1p67F});
  cases.push_back({35, 4096});
  cases.push_back({18, 16384});
  cases.push_back({8300, 8});  // more rows than 16 for each of 512 blocks
  return cases;
}

TEST_F(RmsNormCuda, ForwardAgreesWithReference) {
  std::mt19937 rng(21);
  for (const auto& [tokens, width, scale] : Cases()) {
    const Matrix x = RandomBf16(tokens, width, rng, scale);
    const Matrix weight = RandomBf16(1, width, rng);
    const DeviceMatrix dx(DType::kBF16, x, 8), dw(DType::kBF16, weight);
    const DeviceMatrix y(DType::kBF16, tokens, width, 16), rstd(DType::kF32, 1, tokens);
    RmsNormForward(ctx(), dx.tensor(), dw.vector(), kEps, y.tensor(), rstd.vector());
    std::vector<double> expected(static_cast<size_t>(tokens * width));
    std::vector<double> expected_rstd(static_cast<size_t>(tokens));
    reference::RmsNormForward(tokens, width, x.values().data(), weight.values().data(), kEpsDouble,
                              expected.data(), expected_rstd.data());
    // The square root halves the error of the mean; then mean, eps, root and quotient.
    ExpectClose(rstd.Download(), expected_rstd,
                [&](size_t i) { return (kRowSum / 2 + 4) * kF32Round * expected_rstd[i]; });
    ExpectClose(y.Download(), expected, RoundedOnce(expected));
    EXPECT_TRUE(y.GapsUntouched() && rstd.GapsUntouched());
  }
}

TEST_F(RmsNormCuda, ResidualFormIsAnAdditionThenTheNormOfItsRoundedSum) {
  std::mt19937 rng(22);
  for (const auto& [tokens, width, residual_scale] :
       {Case{33, 72, 3.0F}, Case{5, 1032, 3.0F}, Case{2, 8200, 3.0F}, Case{3, 72, 0x1p67F}}) {
    const float scale = 0.3F;
    const Matrix residual = RandomBf16(tokens, width, rng, residual_scale);
    const Matrix branch = RandomBf16(tokens, width, rng);
    const DeviceMatrix r(DType::kBF16, residual, 8), b(DType::kBF16, branch, 16),
        w(DType::kBF16, RandomBf16(1, width, rng));
    const DeviceMatrix sum(DType::kBF16, tokens, width, 8), y(DType::kBF16, tokens, width),
        rstd(DType::kF32, 1, tokens);
    RmsNormResidualForward(ctx(), r.tensor(), b.tensor(), scale, w.vector(), kEps, sum.tensor(),
                           y.tensor(), rstd.vector());
    std::vector<double> expected = residual.values();
    std::vector<double> size = Absolute(expected);
    const auto bv = branch.values();
    for (size_t i = 0; i < bv.size(); ++i) {
      expected[i] += static_cast<double>(scale) * bv[i];
      size[i] += std::abs(scale * bv[i]);
    }
    // A product and a sum, which may be fused.
    ExpectClose(sum.Download(), expected, RoundedOnce(expected, size, 2));
    EXPECT_TRUE(sum.GapsUntouched());

    const DeviceMatrix y2(DType::kBF16, tokens, width), rstd2(DType::kF32, 1, tokens);
    RmsNormForward(ctx(), sum.tensor(), w.vector(), kEps, y2.tensor(), rstd2.vector());
    EXPECT_EQ(y.Bytes(), y2.Bytes());
    EXPECT_EQ(rstd.Bytes(), rstd2.Bytes());
    RmsNormResidualForward(ctx(), r.tensor(), b.tensor(), scale, w.vector(), kEps, r.tensor(),
                           y2.tensor(), rstd2.vector());
    EXPECT_TRUE(r.Download().SameBits(sum.Download()));
    EXPECT_EQ(y.Bytes(), y2.Bytes());
  }
}

TEST_F(RmsNormCuda, BackwardAgreesWithReferenceAndObeysWrite) {
  std::mt19937 rng(23);
  for (const auto& [tokens, width, scale] : Cases()) {
    const Matrix x = RandomBf16(tokens, width, rng, scale);
    const Matrix weight = RandomBf16(1, width, rng);
    const Matrix dy = RandomBf16(tokens, width, rng);
    const Matrix old_dx = RandomBf16(tokens, width, rng);
    const Matrix old_dweight = Matrix::Random(1, width, rng);
    const DeviceMatrix dev_x(DType::kBF16, x, 8), dev_w(DType::kBF16, weight),
        dev_dy(DType::kBF16, dy, 16);
    const DeviceMatrix y(DType::kBF16, tokens, width), rstd(DType::kF32, 1, tokens);
    RmsNormForward(ctx(), dev_x.tensor(), dev_w.vector(), kEps, y.tensor(), rstd.vector());

    const auto xd = x.values();
    const auto wd = weight.values();
    const auto dyd = dy.values();
    std::vector<double> gradient(xd.size());
    std::vector<double> expected_dw = old_dweight.values();
    reference::RmsNormBackward(tokens, width, dyd.data(), xd.data(), wd.data(), kEpsDouble,
                               gradient.data(), expected_dw.data());
    const Matrix r = rstd.Download();
    std::vector<double> size(xd.size());  // the sum of the terms' absolute values
    std::vector<double> dw_size = Absolute(old_dweight.values());
    for (int64_t t = 0; t < tokens; ++t) {
      const double* row_x = xd.data() + t * width;
      const double* row_dy = dyd.data() + t * width;
      const double rt = r.at(0, t);
      double mean = 0;
      for (int64_t i = 0; i < width; ++i) {
        mean += std::abs(row_dy[i] * wd[static_cast<size_t>(i)] * row_x[i]) / width;
      }
      for (int64_t i = 0; i < width; ++i) {
        size[static_cast<size_t>(t * width + i)] =
            std::abs(rt * wd[static_cast<size_t>(i)] * row_dy[i]) +
            rt * rt * rt * mean * std::abs(row_x[i]);
        dw_size[static_cast<size_t>(i)] += std::abs(row_dy[i] * row_x[i] * rt);
      }
    }
    // The sum over the row and three factors of rstd (each off by half a sum and four roundings),
    // and ten for products, quotient and differences.
    constexpr double kRoundings = kRowSum + 3 * (kRowSum / 2 + 4) + 10;
    for (Write write : {Write::kOverwrite, Write::kAccumulate}) {
      const bool accumulate = write == Write::kAccumulate;
      const auto fresh = [&, tokens = tokens, width = width] {
        return accumulate ? DeviceMatrix(DType::kBF16, old_dx, 8)
                          : DeviceMatrix(DType::kBF16, tokens, width, 8);
      };
      const DeviceMatrix dx = fresh(), dweight(DType::kF32, old_dweight);
      RmsNormBackward(ctx(), dev_dy.tensor(), dev_x.tensor(), dev_w.vector(), rstd.vector(),
                      dx.tensor(), write, dweight.vector());
      std::vector<double> expected = gradient;
      std::vector<double> terms = size;
      if (accumulate) {
        const auto old = old_dx.values();
        for (size_t i = 0; i < old.size(); ++i) {
          expected[i] += old[i];
          terms[i] += std::abs(old[i]);
        }
      }
      ExpectClose(dx.Download(), expected, RoundedOnce(expected, terms, kRoundings));
      // rstd's error and two products a term; one addition a token at most, 16 of the partial sums
      // in a row and 16 of those, one to what was there.
      ExpectClose(dweight.Download(), expected_dw, [&, n = tokens](size_t i) {
        return (kRowSum / 2 + 4 + 2 + static_cast<double>(n) + 33) * kF32Round * dw_size[i];
      });
      EXPECT_TRUE(dx.GapsUntouched() && dweight.GapsUntouched());

      const DeviceMatrix frozen = fresh();
      RmsNormBackward(ctx(), dev_dy.tensor(), dev_x.tensor(), dev_w.vector(), rstd.vector(),
                      frozen.tensor(), write, {});
      EXPECT_EQ(frozen.Bytes(), dx.Bytes());
    }
  }
}

using RmsNormCudaDeathTest = RmsNormCuda;

TEST_F(RmsNormCudaDeathTest, RefusesWhatItCannotRead) {
  const DeviceMatrix x(DType::kBF16, 2, 12), w(DType::kBF16, 1, 12), rstd(DType::kF32, 1, 2);
  EXPECT_DEATH(
      RmsNormForward(ctx(), x.tensor(), w.vector(), kEps, x.tensor(), rstd.vector()),
      "found \\[2, 12\\] bf16 with row stride 12, expected a width, a row stride and an address "
      "that are multiples of 8 elements");
}

}  // namespace
}  // namespace sala::kernels
