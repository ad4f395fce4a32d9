#include "kernels/qk_norm_rope/qk_norm_rope.h"

#include "kernels/qk_norm_rope/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

constexpr float kEps = 1e-6F;
constexpr double kEpsDouble = kEps;
constexpr int64_t kHeads = 3;

struct Parts {
  bool norm;
  bool rope;
};
constexpr Parts kParts[] = {{true, true}, {true, false}, {false, true}, {false, false}};

struct Table {
  Table(int64_t tokens, int64_t d, int32_t first) : cos(tokens, d / 2, 1), sin(tokens, d / 2, 2) {
    std::vector<int32_t> positions(static_cast<size_t>(tokens) + 1);
    for (size_t t = 0; t < positions.size(); ++t) positions[t] = first + static_cast<int32_t>(t);
    KernelTest test;
    RopeTable(test.ctx(), sala::Tensor(positions.data(), {tokens}), d, 10000.0F, cos.tensor(),
              sin.tensor());
  }
  Matrix cos, sin;
};

class QkNormRope : public testing::TestWithParam<Parts> {
 protected:
  std::mt19937 rng_{31};
};

TEST(RopeTable, HoldsCosineAndSineOfTheFloat32Product) {
  constexpr int64_t kD = 16;
  const int32_t first = 524287;
  Table table(3, kD, first);
  for (int64_t t = 0; t < 3; ++t) {
    for (int64_t i = 0; i < kD / 2; ++i) {
      const auto frequency =
          static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / kD));
      const float angle = static_cast<float>(first + t) * frequency;
      EXPECT_EQ(table.cos.at(t, i), static_cast<float>(std::cos(static_cast<double>(angle))));
      EXPECT_EQ(table.sin.at(t, i), static_cast<float>(std::sin(static_cast<double>(angle))));
    }
  }
  EXPECT_TRUE(table.cos.GapsUntouched() && table.sin.GapsUntouched());
}

TEST(RopeTable, StartsWithoutRotation) {
  Table table(1, 8, 0);
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(table.cos.at(0, i), 1.0F);
    EXPECT_EQ(table.sin.at(0, i), 0.0F);
  }
}

// Only the distance of two positions matters to a product of a rotated query and key.
TEST(RopeTable, ProductsDependOnDistanceOnly) {
  constexpr int64_t kD = 8;
  std::mt19937 rng(5);
  Matrix x = Matrix::Random(1, 2 * kD, rng);
  std::vector<double> products;
  for (int32_t shift : {0, 100}) {
    Table table(8, kD, shift);
    const auto cos = table.cos.values();
    const auto sin = table.sin.values();
    std::vector<double> q(kD), k(kD);
    const auto values = x.values();
    reference::Rotate(1, 1, kD, cos.data() + 7 * kD / 2, sin.data() + 7 * kD / 2, 1.0,
                      values.data(), q.data());
    reference::Rotate(1, 1, kD, cos.data() + 2 * kD / 2, sin.data() + 2 * kD / 2, 1.0,
                      values.data() + kD, k.data());
    double sum = 0;
    for (size_t i = 0; i < kD; ++i) sum += q[i] * k[i];
    products.push_back(sum);
  }
  // The float32 angles near 107 are off by at most 107 * 2^-24 (product) and as much again
  // (frequency), for both vectors.
  EXPECT_NEAR(products[0], products[1], 4 * 107 * kF32Round * 4 * kD);
}

TEST_P(QkNormRope, AgreesWithReference) {
  const auto [norm, rope] = GetParam();
  for (int64_t tokens : EdgeSizes()) {
    for (int64_t d : {2, 16, 64}) {
      Matrix x = Matrix::Random(tokens, kHeads * d, rng_, 5);
      Matrix dy = Matrix::Random(tokens, kHeads * d, rng_, 2);
      Matrix weight = Matrix::Random(1, d, rng_);
      Matrix y(tokens, kHeads * d, 3), dx(tokens, kHeads * d, 1), rstd(tokens, kHeads);
      Matrix dweight = Matrix::Random(1, d, rng_);
      Table table(tokens, d, 17);
      const auto xd = x.values();
      const auto dyd = dy.values();
      const auto wd = weight.values();
      const auto cos = table.cos.values();
      const auto sin = table.sin.values();
      const double* w_or_null = norm ? wd.data() : nullptr;
      // An empty vector's data() may be null, which would mean no rotation; with no tokens both are
      // the same.
      const double* cos_or_null = rope ? cos.data() : nullptr;
      std::vector<double> y_expected(xd.size()), dx_expected(xd.size());
      auto dw_expected = dweight.values();
      reference::QkNormRopeForward(tokens, kHeads, d, xd.data(), w_or_null, kEpsDouble, cos_or_null,
                                   sin.data(), y_expected.data());
      reference::QkNormRopeBackward(tokens, kHeads, d, dyd.data(), xd.data(), w_or_null, kEpsDouble,
                                    cos_or_null, sin.data(), dx_expected.data(),
                                    norm ? dw_expected.data() : nullptr);
      KernelTest test;
      const sala::Tensor w = norm ? weight.vector() : sala::Tensor();
      const sala::Tensor c = rope ? table.cos.tensor() : sala::Tensor();
      const sala::Tensor s = rope ? table.sin.tensor() : sala::Tensor();
      QkNormRopeForward(test.ctx(), x.tensor().AsHeads(kHeads, d), w, kEps, c, s,
                        y.tensor().AsHeads(kHeads, d), rstd.tensor());
      QkNormRopeBackward(test.ctx(), dy.tensor().AsHeads(kHeads, d), x.tensor().AsHeads(kHeads, d),
                         w, rstd.tensor(), c, s, dx.tensor().AsHeads(kHeads, d),
                         norm ? dweight.vector() : sala::Tensor());
      // Sizes from whole heads: with X, W, G the largest |x|, |w|, |dy| of all and r the largest
      // rstd, a normed value is at most X r W; a rotation at most doubles; the norm's backward has
      // terms r W (2 G) and r^3 X^2 W (2 G).
      const auto largest = [](const std::vector<double>& v) {
        double m = 0;
        for (double e : v) m = std::max(m, std::abs(e));
        return m;
      };
      const double r = norm && tokens > 0 ? largest(rstd.values()) : 1;
      const double big_w = norm ? largest(wd) : 1;
      const double big_x = largest(xd);
      const double big_g = 2 * largest(dyd);
      // rstd, two products; product and difference of the rotation.
      ExpectClose(y, y_expected, [&](size_t) { return 5 * kF32Round * 2 * big_x * r * big_w; });
      // Rotation 2, norm's backward 8 (rms_norm_test.cc).
      const double dx_size = norm ? r * big_w * big_g * (1 + r * r * big_x * big_x) : big_g;
      ExpectClose(dx, dx_expected, [&](size_t) { return 10 * kF32Round * dx_size; });
      if (norm) {
        const double terms = static_cast<double>(tokens * kHeads);
        ExpectClose(dweight, dw_expected, [&](size_t i) {
          return (6 + terms + terms / 32) * kF32Round *
                 (terms * big_g * big_x * r + std::abs(dw_expected[i]) + 4);
        });
      }
      EXPECT_TRUE(y.GapsUntouched() && dx.GapsUntouched());
    }
  }
}

TEST_P(QkNormRope, ReferenceBackwardEqualsComplexStep) {
  const auto [norm, rope] = GetParam();
  constexpr int64_t kT = 2;
  constexpr int64_t kD = 6;
  using C = std::complex<double>;
  const auto x = Matrix::Random(kT, kHeads * kD, rng_).values();
  const auto w = Matrix::Random(1, kD, rng_).values();
  const auto dy = Matrix::Random(kT, kHeads * kD, rng_).values();
  Table table(kT, kD, 3);
  const auto cos = table.cos.values();
  const auto sin = table.sin.values();
  const double* cos_or_null = rope ? cos.data() : nullptr;
  const auto loss = [&, norm = norm](const std::vector<C>& xc, const std::vector<C>& wc) {
    std::vector<C> y(xc.size());
    reference::QkNormRopeForward<C>(kT, kHeads, kD, xc.data(), norm ? wc.data() : nullptr,
                                    kEpsDouble, cos_or_null, sin.data(), y.data());
    C sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
    return sum;
  };
  const std::vector<C> xc(x.begin(), x.end());
  const std::vector<C> wc(w.begin(), w.end());
  std::vector<double> dx(x.size()), dw(w.size());
  reference::QkNormRopeBackward(kT, kHeads, kD, dy.data(), x.data(), norm ? w.data() : nullptr,
                                kEpsDouble, cos_or_null, sin.data(), dx.data(),
                                norm ? dw.data() : nullptr);
  ExpectSameGradient(dx, ComplexStep(x, [&](const auto& z) { return loss(z, wc); }));
  if (norm) ExpectSameGradient(dw, ComplexStep(w, [&](const auto& z) { return loss(xc, z); }));
}

INSTANTIATE_TEST_SUITE_P(Parts, QkNormRope, testing::ValuesIn(kParts), [](const auto& instance) {
  const bool norm = instance.param.norm;
  const bool rope = instance.param.rope;
  return std::string(norm ? "Norm" : "") + (rope ? "Rope" : "") + (norm || rope ? "" : "Copy");
});

}  // namespace
}  // namespace sala::kernels
