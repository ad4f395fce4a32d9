#include "kernels/rms_norm/rms_norm.h"

#include "kernels/rms_norm/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

constexpr float kEps = 1e-5F;
constexpr double kEpsDouble = kEps;

class RmsNorm : public testing::Test {
 protected:
  std::mt19937 rng_{11};
};

TEST_F(RmsNorm, ForwardAgreesWithReference) {
  for (int64_t tokens : EdgeSizes()) {
    for (int64_t width : {1, 7, 16, 65}) {
      Matrix x = Matrix::Random(tokens, width, rng_, 3);
      Matrix weight = Matrix::Random(1, width, rng_);
      Matrix y(tokens, width, 5);
      Matrix rstd(1, tokens);
      KernelTest test;
      RmsNormForward(test.ctx(), x.tensor(), weight.vector(), kEps, y.tensor(), rstd.vector());
      std::vector<double> expected(static_cast<size_t>(tokens * width));
      std::vector<double> expected_rstd(static_cast<size_t>(tokens));
      reference::RmsNormForward(tokens, width, x.values().data(), weight.values().data(),
                                kEpsDouble, expected.data(), expected_rstd.data());
      // rstd is rounded once from double, then two products.
      ExpectClose(rstd, expected_rstd,
                  [&](size_t i) { return 1.01 * kF32Round * expected_rstd[i]; });
      ExpectClose(y, expected, [&](size_t i) { return 3.01 * kF32Round * std::abs(expected[i]); });
      EXPECT_TRUE(y.GapsUntouched());
    }
  }
}

TEST_F(RmsNorm, ResidualFormIsAnAdditionThenTheNorm) {
  Matrix residual = Matrix::Random(33, 20, rng_, 1);
  Matrix branch = Matrix::Random(33, 20, rng_, 2);
  Matrix weight = Matrix::Random(1, 20, rng_);
  Matrix sum(33, 20), y(33, 20), rstd(1, 33);
  KernelTest test;
  RmsNormResidualForward(test.ctx(), residual.tensor(), branch.tensor(), 0.25F, weight.vector(),
                         kEps, sum.tensor(), y.tensor(), rstd.vector());
  for (int64_t t = 0; t < 33; ++t) {
    for (int64_t i = 0; i < 20; ++i) {
      const float product = 0.25F * branch.at(t, i);
      ASSERT_EQ(sum.at(t, i), residual.at(t, i) + product);
    }
  }
  Matrix y2(33, 20), rstd2(1, 33);
  RmsNormForward(test.ctx(), sum.tensor(), weight.vector(), kEps, y2.tensor(), rstd2.vector());
  EXPECT_TRUE(y.SameBits(y2));
  EXPECT_TRUE(rstd.SameBits(rstd2));

  Matrix in_place = residual;
  RmsNormResidualForward(test.ctx(), in_place.tensor(), branch.tensor(), 0.25F, weight.vector(),
                         kEps, in_place.tensor(), y2.tensor(), rstd2.vector());
  EXPECT_TRUE(in_place.SameBits(sum));
  EXPECT_TRUE(y.SameBits(y2));
}

TEST_F(RmsNorm, ReferenceBackwardEqualsComplexStep) {
  constexpr int64_t kT = 3;
  constexpr int64_t kW = 5;
  using C = std::complex<double>;
  const auto x = Matrix::Random(kT, kW, rng_).values();
  const auto w = Matrix::Random(1, kW, rng_).values();
  const auto dy = Matrix::Random(kT, kW, rng_).values();
  const auto loss = [&](const std::vector<C>& z, const std::vector<C>& weight) {
    std::vector<C> y(z.size());
    reference::RmsNormForward<C>(kT, kW, z.data(), weight.data(), kEpsDouble, y.data(), nullptr);
    C sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
    return sum;
  };
  const std::vector<C> wc(w.begin(), w.end());
  const std::vector<C> xc(x.begin(), x.end());
  std::vector<double> dx(x.size());
  std::vector<double> dw(w.size());
  reference::RmsNormBackward(kT, kW, dy.data(), x.data(), w.data(), kEpsDouble, dx.data(),
                             dw.data());
  ExpectSameGradient(dx, ComplexStep(x, [&](const auto& z) { return loss(z, wc); }));
  ExpectSameGradient(dw, ComplexStep(w, [&](const auto& z) { return loss(xc, z); }));
}

TEST_F(RmsNorm, BackwardAgreesWithReferenceAndObeysWrite) {
  for (int64_t tokens : EdgeSizes()) {
    for (Write write : {Write::kOverwrite, Write::kAccumulate}) {
      const int64_t width = 37;
      Matrix x = Matrix::Random(tokens, width, rng_, 3);
      Matrix weight = Matrix::Random(1, width, rng_);
      Matrix dy = Matrix::Random(tokens, width, rng_, 1);
      Matrix y(tokens, width), rstd(1, tokens);
      Matrix dx = write == Write::kAccumulate ? Matrix::Random(tokens, width, rng_, 2)
                                              : Matrix(tokens, width, 2);
      Matrix dweight = Matrix::Random(1, width, rng_);
      const Matrix old_dx = dx;
      const Matrix old_dweight = dweight;
      KernelTest test;
      RmsNormForward(test.ctx(), x.tensor(), weight.vector(), kEps, y.tensor(), rstd.vector());
      RmsNormBackward(test.ctx(), dy.tensor(), x.tensor(), weight.vector(), rstd.vector(),
                      dx.tensor(), write, dweight.vector());

      const auto xd = x.values();
      const auto wd = weight.values();
      const auto dyd = dy.values();
      std::vector<double> expected(xd.size());
      std::vector<double> expected_dw = old_dweight.values();
      reference::RmsNormBackward(tokens, width, dyd.data(), xd.data(), wd.data(), kEpsDouble,
                                 expected.data(), expected_dw.data());
      std::vector<double> size(xd.size());  // the sum of the terms' absolute values
      std::vector<double> dw_size = old_dweight.values();
      for (double& s : dw_size) s = std::abs(s);
      for (int64_t t = 0; t < tokens; ++t) {
        const auto at = [&](int64_t i) { return static_cast<size_t>(t * width + i); };
        const double r = rstd.at(0, t);
        double mean = 0;
        for (int64_t i = 0; i < width; ++i) {
          mean += std::abs(dyd[at(i)] * wd[static_cast<size_t>(i)] * xd[at(i)]) / width;
        }
        for (int64_t i = 0; i < width; ++i) {
          size[at(i)] = std::abs(r * wd[static_cast<size_t>(i)] * dyd[at(i)]) +
                        r * r * r * mean * std::abs(xd[at(i)]);
          if (write == Write::kAccumulate) {
            expected[at(i)] += old_dx.values()[at(i)];
            size[at(i)] += std::abs(old_dx.values()[at(i)]);
          }
          dw_size[static_cast<size_t>(i)] += std::abs(dyd[at(i)] * xd[at(i)] * r);
        }
      }
      // The longest path: rstd three times (its own rounding), weight * dy, the mean's own
      // rounding, x * rstd, their product, difference, times rstd, sum with old.
      ExpectClose(dx, expected, [&](size_t i) { return 10 * kF32Round * size[i]; });
      // Three roundings a term, then one for each of at most tokens + pieces + 1 additions.
      ExpectClose(dweight, expected_dw, [&](size_t i) {
        return static_cast<double>(3 + tokens + tokens / 32 + 2) * kF32Round * dw_size[i];
      });
      EXPECT_TRUE(dx.GapsUntouched());

      Matrix frozen = old_dx;
      RmsNormBackward(test.ctx(), dy.tensor(), x.tensor(), weight.vector(), rstd.vector(),
                      frozen.tensor(), write, {});
      EXPECT_TRUE(frozen.SameBits(dx));
    }
  }
}

}  // namespace
}  // namespace sala::kernels
