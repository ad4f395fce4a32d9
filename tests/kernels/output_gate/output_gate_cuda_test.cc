#include "kernels/output_gate/output_gate.h"
#include "kernels/output_gate/reference.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using OutputGateCuda = CudaKernelTest;

constexpr float kEps = 1e-5F;

// A sum over a row passes at most 32 values in a thread, 5 steps of a butterfly and 16 warps.
constexpr double kRowSum = 32 + 5 + 16;
// rstd: half of that, mean, eps, root and quotient.
constexpr double kRstd = kRowSum / 2 + 4;

struct Case {
  int64_t tokens, width;
  bool norm, gate;
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const auto& [norm, gate] : {std::pair{true, true}, {true, false}, {false, true}}) {
    for (int64_t tokens : EdgeSizes()) {
      if (kSlowBuild && tokens > 1 && tokens != 33) continue;
      for (int64_t width : {8, 72, 520}) {
        if (!kSlowBuild || width == 72 || tokens == 1) cases.push_back({tokens, width, norm, gate});
      }
    }
    cases.push_back({2, 8200, norm, gate});
    if (kSlowBuild) continue;
    cases.push_back({33, 4104, norm, gate});  // more packs than a grid has threads
    cases.push_back({2, 16384, norm, gate});
  }
  return cases;
}

TEST_F(OutputGateCuda, AgreesWithReference) {
  std::mt19937 rng(31);
  for (const Case& c : Cases()) {
    const int64_t tokens = c.tokens;
    const int64_t width = c.width;
    Matrix o = RandomBf16(tokens, width, rng, 2.0F);
    // Rows so small that epsilon counts.
    for (int64_t t = 1; t < tokens; t += 3) {
      for (int64_t i = 0; i < width; ++i) o.at(t, i) *= 0x1p-9F;
    }
    const Matrix z = RandomBf16(tokens, width, rng, 3.0F);
    const Matrix weight = RandomBf16(1, width, rng);
    const Matrix dy = RandomBf16(tokens, width, rng);
    const Matrix old_dweight = Matrix::Random(1, width, rng);
    const DeviceMatrix dev_o(DType::kBF16, o, 8), dev_z(DType::kBF16, z, 24),
        dev_w(DType::kBF16, weight), dev_dy(DType::kBF16, dy, 8);
    const DeviceMatrix y(DType::kBF16, tokens, width, 16), rstd(DType::kF32, 1, tokens),
        dout(DType::kBF16, tokens, width, 8), dz(DType::kBF16, tokens, width, 16),
        dweight(DType::kF32, old_dweight);
    const ConstTensor w = c.norm ? ConstTensor(dev_w.vector()) : ConstTensor();
    const ConstTensor zt = c.gate ? ConstTensor(dev_z.tensor()) : ConstTensor();
    OutputGateForward(ctx(), dev_o.tensor(), w, zt, kEps, y.tensor(), rstd.vector());
    OutputGateBackward(ctx(), dev_dy.tensor(), dev_o.tensor(), w, zt, rstd.vector(), dout.tensor(),
                       c.gate ? dz.tensor() : sala::Tensor(),
                       c.norm ? dweight.vector() : sala::Tensor());

    const auto od = o.values();
    const auto zd = z.values();
    const auto wd = weight.values();
    const auto dyd = dy.values();
    const double* wp = c.norm ? wd.data() : nullptr;
    const double* zp = c.gate ? zd.data() : nullptr;
    std::vector<double> expected(od.size()), expected_dout(od.size()), expected_dz(od.size());
    std::vector<double> expected_dw = old_dweight.values();
    reference::OutputGateForward(tokens, width, od.data(), wp, zp, kEps, expected.data());
    reference::OutputGateBackward(tokens, width, dyd.data(), od.data(), wp, zp, kEps,
                                  expected_dout.data(), expected_dz.data(),
                                  c.norm ? expected_dw.data() : nullptr);
    ExpectClose(y.Download(), expected, RoundedOnce(expected));
    EXPECT_TRUE(y.GapsUntouched() && dout.GapsUntouched() && dz.GapsUntouched());

    if (c.norm) {
      std::vector<double> expected_rstd;
      for (int64_t t = 0; t < tokens; ++t) {
        double square = 0;
        for (int64_t i = 0; i < width; ++i) {
          square += od[static_cast<size_t>(t * width + i)] * od[static_cast<size_t>(t * width + i)];
        }
        expected_rstd.push_back(1 / std::sqrt(square / static_cast<double>(width) + kEps));
      }
      ExpectClose(rstd.Download(), expected_rstd,
                  [&](size_t t) { return kRstd * kF32Round * expected_rstd[t]; });
    }

    // The sums of the terms' absolute values.
    std::vector<double> dout_size(od.size()), dz_size(od.size());
    std::vector<double> dw_size = Absolute(old_dweight.values());
    const Matrix found_rstd = rstd.Download();
    for (int64_t t = 0; t < tokens; ++t) {
      const double r = c.norm ? found_rstd.at(0, t) : 1.0;
      double mean = 0;
      const auto dn = [&](int64_t i) {
        const auto at = static_cast<size_t>(t * width + i);
        return std::abs(dyd[at] * (c.gate ? reference::Sigmoid(zd[at]) : 1.0));
      };
      const auto weight_at = [&](int64_t i) {
        return c.norm ? std::abs(wd[static_cast<size_t>(i)]) : 1.0;
      };
      for (int64_t i = 0; i < width; ++i) {
        mean += dn(i) * weight_at(i) * std::abs(od[static_cast<size_t>(t * width + i)]) / width;
      }
      for (int64_t i = 0; i < width; ++i) {
        const auto at = static_cast<size_t>(t * width + i);
        dout_size[at] =
            r * weight_at(i) * dn(i) + (c.norm ? r * r * r * mean : 0.0) * std::abs(od[at]);
        // 1 - s loses digits where s is near 1: relative to s itself.
        dz_size[at] = r * weight_at(i) * dn(i) * std::abs(od[at]);
        dw_size[static_cast<size_t>(i)] += dn(i) * std::abs(od[at]) * r;
      }
    }
    // As in RMSNorm, with the sigmoid's error (2^-16, 256 roundings of float32, cuda_math.h) where
    // there is a gate; in the sum over the row all terms may have it.
    const double sigmoid = c.gate ? 256 : 0;
    ExpectClose(dout.Download(), expected_dout,
                RoundedOnce(expected_dout, dout_size, 2 * sigmoid + kRowSum + 3 * kRstd + 10));
    if (c.gate) {
      ExpectClose(dz.Download(), expected_dz,
                  RoundedOnce(expected_dz, dz_size, 2 * sigmoid + kRstd + 6));
    } else {
      EXPECT_TRUE(std::isnan(tokens > 0 ? dz.Download().at(0, 0) : NAN));
    }
    if (c.norm) {
      ExpectClose(dweight.Download(), expected_dw, [&](size_t i) {
        return (sigmoid + kRstd + 3 + static_cast<double>(tokens) + 33) * kF32Round * dw_size[i];
      });
      const DeviceMatrix frozen(DType::kBF16, tokens, width, 8);
      OutputGateBackward(ctx(), dev_dy.tensor(), dev_o.tensor(), w, zt, rstd.vector(),
                         frozen.tensor(), c.gate ? dz.tensor() : sala::Tensor(), {});
      EXPECT_EQ(frozen.Bytes(), dout.Bytes());
    } else {
      EXPECT_TRUE(dweight.Download().SameBits(old_dweight));
    }
  }
}

// Gates far from zero: sigmoid must end at 0 and 1, not at NaN.
TEST_F(OutputGateCuda, SaturatesWithoutOverflow) {
  Matrix o = Matrix::Filled(1, 8, 2.0F), z(1, 8), dy = Matrix::Filled(1, 8, 1.0F);
  const std::vector<float> gates = {-3e38F, -1000.0F, -100.0F, -80.0F,
                                    80.0F,  100.0F,   1000.0F, 3e38F};
  for (int64_t i = 0; i < 8; ++i) z.at(0, i) = gates[static_cast<size_t>(i)];
  const DeviceMatrix dev_o(DType::kBF16, o), dev_z(DType::kBF16, z), dev_dy(DType::kBF16, dy);
  const DeviceMatrix y(DType::kBF16, 1, 8), dout(DType::kBF16, 1, 8), dz(DType::kBF16, 1, 8);
  OutputGateForward(ctx(), dev_o.tensor(), {}, dev_z.tensor(), kEps, y.tensor(), {});
  OutputGateBackward(ctx(), dev_dy.tensor(), dev_o.tensor(), {}, dev_z.tensor(), {}, dout.tensor(),
                     dz.tensor(), {});
  const Matrix found = y.Download(), found_do = dout.Download(), found_dz = dz.Download();
  for (int64_t i = 0; i < 8; ++i) {
    const double limit = i < 4 ? 0.0 : 1.0;
    EXPECT_NEAR(found.at(0, i), 2.0 * limit, 1e-30);
    EXPECT_NEAR(found_do.at(0, i), limit, 1e-30);
    EXPECT_NEAR(found_dz.at(0, i), 0.0, 1e-30);
  }
}

}  // namespace
}  // namespace sala::kernels
