#include "kernels/output_gate/output_gate.h"

#include "kernels/output_gate/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

constexpr float kEps = 1e-6F;
constexpr double kEpsDouble = kEps;

struct Parts {
  bool norm;
  bool gate;
};
constexpr Parts kParts[] = {{true, true}, {true, false}, {false, true}};

class OutputGate : public testing::TestWithParam<Parts> {
 protected:
  std::mt19937 rng_{21};
};

TEST_P(OutputGate, AgreesWithReference) {
  const auto [norm, gate] = GetParam();
  for (int64_t tokens : EdgeSizes()) {
    const int64_t width = 45;
    Matrix o = Matrix::Random(tokens, width, rng_, 1);
    Matrix z = Matrix::Random(tokens, width, rng_, 2, 2.0F);
    Matrix dy = Matrix::Random(tokens, width, rng_, 3);
    Matrix weight = Matrix::Random(1, width, rng_);
    Matrix y(tokens, width, 1), rstd(1, tokens), dout(tokens, width, 2), dz(tokens, width, 3);
    Matrix dweight = Matrix::Random(1, width, rng_);
    const auto od = o.values();
    const auto zd = z.values();
    const auto dyd = dy.values();
    const auto wd = weight.values();
    const double* w_or_null = norm ? wd.data() : nullptr;
    const double* z_or_null = gate ? zd.data() : nullptr;
    std::vector<double> y_expected(od.size()), dout_expected(od.size()), dz_expected(od.size());
    auto dw_expected = dweight.values();
    double dw_size = 1;
    reference::OutputGateForward(tokens, width, od.data(), w_or_null, z_or_null, kEpsDouble,
                                 y_expected.data());
    reference::OutputGateBackward(tokens, width, dyd.data(), od.data(), w_or_null, z_or_null,
                                  kEpsDouble, dout_expected.data(), dz_expected.data(),
                                  dw_expected.data());
    KernelTest test;
    const sala::Tensor w = norm ? weight.vector() : sala::Tensor();
    const sala::Tensor gate_tensor = gate ? z.tensor() : sala::Tensor();
    OutputGateForward(test.ctx(), o.tensor(), w, gate_tensor, kEps, y.tensor(), rstd.vector());
    OutputGateBackward(test.ctx(), dy.tensor(), o.tensor(), w, gate_tensor, rstd.vector(),
                       dout.tensor(), gate ? dz.tensor() : sala::Tensor(),
                       norm ? dweight.vector() : sala::Tensor());
    // rstd, two products, sigmoid (6 roundings, vector_math_test.cc), product.
    ExpectClose(y, y_expected,
                [&](size_t i) { return 10.1 * kF32Round * std::abs(y_expected[i]); });
    // One row's largest terms stand for the sum of the terms of each element: first and second term
    // of the norm's backward.
    std::vector<double> size(od.size());
    for (int64_t t = 0; t < tokens; ++t) {
      const auto row = static_cast<size_t>(t * width);
      double mean = 0;
      const double r = norm ? rstd.at(0, t) : 1;
      for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
        mean += std::abs(dyd[row + i] * wd[i] * od[row + i]) / static_cast<double>(width);
      }
      for (size_t i = 0; i < static_cast<size_t>(width); ++i) {
        size[row + i] =
            norm ? std::abs(r * wd[i] * dyd[row + i]) + r * r * r * mean * std::abs(od[row + i])
                 : std::abs(dyd[row + i]);
        dw_size = std::max(dw_size, std::abs(dyd[row + i] * od[row + i] * r));
      }
    }
    // The norm's backward (8 roundings, rms_norm_test.cc) after sigmoid and a product.
    ExpectClose(dout, dout_expected, [&](size_t i) { return 15 * kF32Round * size[i]; });
    if (gate) {
      // 1 - s may cancel for s near 1: its error is that of s itself, so relative to |dy n| s.
      ExpectClose(dz, dz_expected, [&](size_t i) {
        const double n = reference::Sigmoid(zd[i]) == 0 ? 0 : y_expected[i];
        return 20 * kF32Round * std::abs(dyd[i] * n);
      });
    }
    if (norm) {
      // Sigmoid and 4 products a term, then an addition for each token and piece.
      ExpectClose(dweight, dw_expected, [&](size_t) {
        return static_cast<double>(12 + tokens + tokens / 32) * kF32Round *
               static_cast<double>(tokens + 4) * dw_size;
      });
    }
    EXPECT_TRUE(y.GapsUntouched() && dout.GapsUntouched() && dz.GapsUntouched());
  }
}

TEST_P(OutputGate, ReferenceBackwardEqualsComplexStep) {
  const auto [norm, gate] = GetParam();
  constexpr int64_t kT = 2;
  constexpr int64_t kW = 5;
  using C = std::complex<double>;
  const auto o = Matrix::Random(kT, kW, rng_).values();
  const auto z = Matrix::Random(kT, kW, rng_).values();
  const auto w = Matrix::Random(1, kW, rng_).values();
  const auto dy = Matrix::Random(kT, kW, rng_).values();
  const auto loss = [&, norm = norm, gate = gate](const std::vector<C>& oc,
                                                  const std::vector<C>& wc,
                                                  const std::vector<C>& zc) {
    std::vector<C> y(oc.size());
    reference::OutputGateForward<C>(kT, kW, oc.data(), norm ? wc.data() : nullptr,
                                    gate ? zc.data() : nullptr, kEpsDouble, y.data());
    C sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
    return sum;
  };
  const std::vector<C> oc(o.begin(), o.end());
  const std::vector<C> zc(z.begin(), z.end());
  const std::vector<C> wc(w.begin(), w.end());
  std::vector<double> dout(o.size()), dz(z.size()), dw(w.size());
  reference::OutputGateBackward(kT, kW, dy.data(), o.data(), norm ? w.data() : nullptr,
                                gate ? z.data() : nullptr, kEpsDouble, dout.data(), dz.data(),
                                norm ? dw.data() : nullptr);
  ExpectSameGradient(dout, ComplexStep(o, [&](const auto& x) { return loss(x, wc, zc); }));
  if (gate) ExpectSameGradient(dz, ComplexStep(z, [&](const auto& x) { return loss(oc, wc, x); }));
  if (norm) ExpectSameGradient(dw, ComplexStep(w, [&](const auto& x) { return loss(oc, x, zc); }));
}

INSTANTIATE_TEST_SUITE_P(Parts, OutputGate, testing::ValuesIn(kParts), [](const auto& instance) {
  return std::string(instance.param.norm ? "Norm" : "") + (instance.param.gate ? "Gate" : "");
});

}  // namespace
}  // namespace sala::kernels
