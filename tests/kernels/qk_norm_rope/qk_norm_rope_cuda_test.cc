#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/qk_norm_rope/reference.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using QkNormRopeCuda = CudaKernelTest;

constexpr float kEps = 1e-5F;
constexpr float kTheta = 10000.0F;

// A sum over a head: 16 terms in a lane, added in pairs or one by one, and 3 steps of a butterfly.
constexpr double kHeadSum = 16 + 3;
// rstd: half of that, mean, eps, root and quotient.
constexpr double kRstd = kHeadSum / 2 + 4;

TEST_F(QkNormRopeCuda, TableRoundsTheAngleAsTheCpuDoes) {
  std::vector<int32_t> positions = {0, 1, 2, 31, 127, 4096, 65535, 131071, 524287, 999999, 1048575};
  if (!kSlowBuild) {
    // More angles than a grid has threads.
    for (int32_t p = 3; p < 1 << 20; p += 3391) positions.push_back(p);
  }
  const auto tokens = static_cast<int64_t>(positions.size());
  const DeviceIntegers device_positions(positions);
  for (int64_t d : {16, 32, 64, 128}) {
    const DeviceMatrix cos(DType::kF32, tokens, d / 2, 4), sin(DType::kF32, tokens, d / 2);
    RopeTable(ctx(), device_positions.tensor(), d, kTheta, cos.tensor(), sin.tensor());
    Matrix host_cos(tokens, d / 2), host_sin(tokens, d / 2);
    KernelTest host;
    RopeTable(host.ctx(), sala::Tensor(positions.data(), {tokens}), d, kTheta, host_cos.tensor(),
              host_sin.tensor());
    // Both are float64 results, off by a unit or two of theirs, rounded to float32: equal but where
    // the two lie on different sides of a tie, 2^-28 of all, and then a unit of float32 apart.
    const auto near = [](const Matrix& expected) {
      return
          [values = expected.values()](size_t i) { return 2.01 * kF32Round * std::abs(values[i]); };
    };
    ExpectClose(cos.Download(), host_cos.values(), near(host_cos));
    ExpectClose(sin.Download(), host_sin.values(), near(host_sin));
    EXPECT_TRUE(cos.GapsUntouched() && sin.GapsUntouched());
    if (TestDevice().info().emulated) {
      EXPECT_TRUE(cos.Download().SameBits(host_cos));
      EXPECT_TRUE(sin.Download().SameBits(host_sin));
    }
  }
}

struct Case {
  int64_t tokens, heads, d;
  bool norm, rotate;
  float factor = 1.0F;  // of every second head of x
};

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (int64_t d : {16, 32, 64, 128}) {
    for (const auto& [norm, rotate] : {std::pair{true, true}, {true, false}, {false, true}}) {
      cases.push_back({9, 3, d, norm, rotate});
      // Squares that leave float32: the sum of some heads, every square, inputs near its largest.
      for (float factor : {0x1p61F, 0x1p67F, 0x1p120F}) {
        if (norm) cases.push_back({9, 3, d, norm, rotate, factor});
      }
      if (kSlowBuild) continue;
      cases.push_back({65, 2, d, norm, rotate});
      cases.push_back({3, 33, d, norm, rotate});  // more heads than a warp takes at once
    }
  }
  for (int64_t tokens : EdgeSizes()) {
    if (kSlowBuild && tokens > 1) break;
    cases.push_back({tokens, 1, 32, true, true});
  }
  if (!kSlowBuild) {
    cases.push_back({2, 130, 16, true, true});       // heads in two blocks
    cases.push_back({8200 + 7, 1, 16, true, true});  // more tokens than 8 for each of 1024 blocks
  }
  return cases;
}

TEST_F(QkNormRopeCuda, AgreesWithReference) {
  std::mt19937 rng(41);
  for (const Case& c : Cases()) {
    const int64_t tokens = c.tokens;
    const int64_t width = c.heads * c.d;
    const int64_t half = c.d / 2;
    Matrix x = RandomBf16(tokens, width, rng, 2.0F);
    // Tokens so small that epsilon counts.
    for (int64_t t = 1; t < tokens; t += 3) {
      for (int64_t i = 0; i < width; ++i) x.at(t, i) *= 0x1p-9F;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < width; ++i) x.at(t, i) *= i / c.d % 2 == 0 ? c.factor : 1.0F;
    }
    const Matrix dy = RandomBf16(tokens, width, rng);
    const Matrix weight = RandomBf16(1, c.d, rng);
    const Matrix old_dweight = Matrix::Random(1, c.d, rng);
    std::vector<int32_t> positions;
    for (int64_t t = 0; t < tokens; ++t) positions.push_back(static_cast<int32_t>(t * 37 % 1000));
    const DeviceIntegers device_positions(positions);
    const DeviceMatrix dev_x(DType::kBF16, x, 24), dev_dy(DType::kBF16, dy, 8),
        dev_w(DType::kBF16, weight), dev_cos(DType::kF32, tokens, half, 4),
        dev_sin(DType::kF32, tokens, half);
    RopeTable(ctx(), device_positions.tensor(), c.d, kTheta, dev_cos.tensor(), dev_sin.tensor());
    const DeviceMatrix y(DType::kBF16, tokens, width, 8), rstd(DType::kF32, tokens, c.heads, 3),
        dx(DType::kBF16, tokens, width, 16), dweight(DType::kF32, old_dweight);
    const ConstTensor w = c.norm ? ConstTensor(dev_w.vector()) : ConstTensor();
    const ConstTensor cos = c.rotate ? ConstTensor(dev_cos.tensor()) : ConstTensor();
    const ConstTensor sin = c.rotate ? ConstTensor(dev_sin.tensor()) : ConstTensor();
    const auto heads = [&](const DeviceMatrix& m) { return m.heads(c.heads, c.d); };
    QkNormRopeForward(ctx(), heads(dev_x), w, kEps, cos, sin, heads(y), rstd.tensor());
    QkNormRopeBackward(ctx(), heads(dev_dy), heads(dev_x), w, rstd.tensor(), cos, sin, heads(dx),
                       c.norm ? dweight.vector() : sala::Tensor());

    const auto xd = x.values();
    const auto dyd = dy.values();
    const auto wd = weight.values();
    const auto cosd = dev_cos.Download().values();
    const auto sind = dev_sin.Download().values();
    const double* wp = c.norm ? wd.data() : nullptr;
    const double* cp = c.rotate ? cosd.data() : nullptr;
    std::vector<double> expected(xd.size()), expected_dx(xd.size());
    std::vector<double> expected_dw = old_dweight.values();
    reference::QkNormRopeForward(tokens, c.heads, c.d, xd.data(), wp, kEps, cp, sind.data(),
                                 expected.data());
    reference::QkNormRopeBackward(tokens, c.heads, c.d, dyd.data(), xd.data(), wp, kEps, cp,
                                  sind.data(), expected_dx.data(),
                                  c.norm ? expected_dw.data() : nullptr);
    // Sizes: with a rotation at most sqrt(2) of the pair's, so the sum of both.
    std::vector<double> size(xd.size()), dx_size(xd.size());
    std::vector<double> dw_size = Absolute(old_dweight.values());
    std::vector<double> expected_rstd;
    for (int64_t h = 0; h < tokens * c.heads; ++h) {
      double square = 0;
      for (int64_t i = 0; i < c.d; ++i)
        square += xd[static_cast<size_t>(h * c.d + i)] * xd[static_cast<size_t>(h * c.d + i)];
      const double r = c.norm ? 1.0 / std::sqrt(square / static_cast<double>(c.d) + kEps) : 1.0;
      expected_rstd.push_back(r);
      const auto pair = [&](const std::vector<double>& v, int64_t i, bool weighted) {
        double sum = 0;
        for (int64_t j : {i, (i + half) % c.d}) {
          if (j != i && !c.rotate) continue;
          sum += std::abs(v[static_cast<size_t>(h * c.d + j)] *
                          (weighted && c.norm ? wd[static_cast<size_t>(j)] : 1.0));
        }
        return sum;
      };
      double mean = 0;
      for (int64_t i = 0; i < c.d; ++i) {
        mean += pair(dyd, i, false) *
                std::abs(wd[static_cast<size_t>(i)] * xd[static_cast<size_t>(h * c.d + i)]) /
                static_cast<double>(c.d);
      }
      for (int64_t i = 0; i < c.d; ++i) {
        const auto at = static_cast<size_t>(h * c.d + i);
        const double dn = pair(dyd, i, false);
        size[at] = r * pair(xd, i, true);
        dx_size[at] = c.norm ? r * std::abs(wd[static_cast<size_t>(i)]) * dn +
                                   r * r * r * mean * std::abs(xd[at])
                             : dn;
        dw_size[static_cast<size_t>(i)] += dn * std::abs(xd[at]) * r;
      }
    }
    // rstd and two products; two products and a sum of the rotation.
    ExpectClose(y.Download(), expected, RoundedOnce(expected, size, kRstd + 2 + 3));
    // The rotation, the sum over the head, three factors of rstd, products and differences.
    ExpectClose(dx.Download(), expected_dx,
                RoundedOnce(expected_dx, dx_size, 3 + kHeadSum + 3 * kRstd + 10));
    EXPECT_TRUE(y.GapsUntouched() && dx.GapsUntouched() && rstd.GapsUntouched());
    if (c.norm) {
      ExpectClose(rstd.Download(), expected_rstd,
                  [&](size_t h) { return kRstd * kF32Round * expected_rstd[h]; });
      // At most one addition a head, 3 steps of a butterfly, 8 warps, and 80 over the blocks.
      ExpectClose(dweight.Download(), expected_dw, [&](size_t i) {
        return (3 + kRstd + 2 + static_cast<double>(tokens * c.heads) + 3 + 8 + 81) * kF32Round *
               dw_size[i];
      });
      const DeviceMatrix frozen(DType::kBF16, tokens, width, 16);
      QkNormRopeBackward(ctx(), heads(dev_dy), heads(dev_x), w, rstd.tensor(), cos, sin,
                         heads(frozen), {});
      EXPECT_EQ(frozen.Bytes(), dx.Bytes());
    } else {
      EXPECT_TRUE(dweight.Download().SameBits(old_dweight));
    }
  }
}

using QkNormRopeCudaDeathTest = QkNormRopeCuda;

TEST_F(QkNormRopeCudaDeathTest, RefusesOtherHeadDimensions) {
  const DeviceMatrix x(DType::kBF16, 2, 96);
  EXPECT_DEATH(QkNormRopeForward(ctx(), x.heads(4, 24), {}, kEps, {}, {}, x.heads(4, 24), {}),
               "head dimension 24, expected 16, 32, 64 or 128 on a GPU");
}

}  // namespace
}  // namespace sala::kernels
