#include "kernels/swiglu/swiglu.h"

#include "kernels/swiglu/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

// Sigmoid (6 roundings, vector_math_test.cc) and at most 4 operations after it on values of the
// result's size.
constexpr double kRoundings = 10;

TEST(SwiGlu, AgreesWithReference) {
  std::mt19937 rng(2);
  for (int64_t tokens : EdgeSizes()) {
    for (int64_t width : {1, 17, 64}) {
      Matrix gate = Matrix::Random(tokens, width, rng, 2, 3.0F);
      Matrix up = Matrix::Random(tokens, width, rng, 3);
      Matrix dy = Matrix::Random(tokens, width, rng, 4);
      Matrix y(tokens, width, 1), dgate(tokens, width, 1), dup(tokens, width, 1);
      KernelTest test;
      SwiGluForward(test.ctx(), gate.tensor(), up.tensor(), y.tensor());
      SwiGluBackward(test.ctx(), dy.tensor(), gate.tensor(), up.tensor(), dgate.tensor(),
                     dup.tensor());
      const auto g = gate.values();
      const auto u = up.values();
      const auto d = dy.values();
      std::vector<double> expected(g.size()), expected_dgate(g.size()), expected_dup(g.size());
      const auto n = static_cast<int64_t>(g.size());
      reference::SwiGluForward(n, g.data(), u.data(), expected.data());
      reference::SwiGluBackward(n, d.data(), g.data(), u.data(), expected_dgate.data(),
                                expected_dup.data());
      ExpectClose(y, expected,
                  [&](size_t i) { return kRoundings * kF32Round * std::abs(expected[i]); });
      ExpectClose(dup, expected_dup,
                  [&](size_t i) { return kRoundings * kF32Round * std::abs(expected_dup[i]); });
      // 1 - s and 1 + g (1 - s) may cancel: bounded by the terms, |dy u| s (1 + |g|), with
      // sigmoid's error in each.
      ExpectClose(dgate, expected_dgate, [&](size_t i) {
        return 2 * kRoundings * kF32Round * std::abs(d[i] * u[i]) * reference::Sigmoid(g[i]) *
               (1 + std::abs(g[i]));
      });
      EXPECT_TRUE(y.GapsUntouched() && dgate.GapsUntouched() && dup.GapsUntouched());

      Matrix gate_in_place = gate;
      Matrix up_in_place = up;
      SwiGluBackward(test.ctx(), dy.tensor(), gate_in_place.tensor(), up_in_place.tensor(),
                     gate_in_place.tensor(), up_in_place.tensor());
      EXPECT_TRUE(gate_in_place.SameBits(dgate) && up_in_place.SameBits(dup));
    }
  }
}

TEST(SwiGlu, ReferenceBackwardEqualsComplexStep) {
  constexpr int64_t kN = 9;
  using C = std::complex<double>;
  std::mt19937 rng(3);
  const auto g = Matrix::Random(1, kN, rng, 0, 3.0F).values();
  const auto u = Matrix::Random(1, kN, rng).values();
  const auto dy = Matrix::Random(1, kN, rng).values();
  const auto loss = [&](const std::vector<C>& gate, const std::vector<C>& up) {
    std::vector<C> y(gate.size());
    reference::SwiGluForward(kN, gate.data(), up.data(), y.data());
    C sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
    return sum;
  };
  const std::vector<C> gc(g.begin(), g.end());
  const std::vector<C> uc(u.begin(), u.end());
  std::vector<double> dg(kN), du(kN);
  reference::SwiGluBackward(kN, dy.data(), g.data(), u.data(), dg.data(), du.data());
  ExpectSameGradient(dg, ComplexStep(g, [&](const auto& z) { return loss(z, uc); }));
  ExpectSameGradient(du, ComplexStep(u, [&](const auto& z) { return loss(gc, z); }));
}

}  // namespace
}  // namespace sala::kernels
