#include "kernels/adamw/adamw.h"
#include "kernels/adamw/reference.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using AdamWCuda = CudaKernelTest;

// Float32 division, root, product and sum are rounded correctly on a device, subnormal numbers
// included, and the kernel fuses nothing: every step has the bits of the CPU form, which is held
// against the double reference in its own test.
TEST_F(AdamWCuda, HasTheBitsOfTheCpuForm) {
  std::mt19937 rng(81);
  // On no boundary (begin 1 and 3) four elements at a time are not possible, nor where only the
  // rounded copy is on none (begin 8 here: it begins one element later).
  for (const int64_t begin : {0, 1, 3, 4, 8}) {
    const int64_t rounded_begin = begin == 8 ? 9 : begin;
    for (const int64_t n : {0, 1, 3, 4, 33, 1030, kSlowBuild ? 5 : 20007}) {
      const auto part = [&](const DeviceMatrix& m) { return m.vector().Rows(begin, begin + n); };
      Matrix param = Matrix::Random(1, n, rng);
      Matrix exp_avg = Matrix::Filled(1, n, 0);
      Matrix exp_avg_sq = Matrix::Filled(1, n, 0);
      const auto shifted = [&](const Matrix& m) {
        Matrix all = Matrix::Filled(1, begin + n, 5.0F);
        for (int64_t i = 0; i < n; ++i) all.at(0, begin + i) = m.at(0, i);
        return all;
      };
      const DeviceMatrix p(DType::kF32, shifted(param)), m(DType::kF32, shifted(exp_avg)),
          v(DType::kF32, shifted(exp_avg_sq)), rounded(DType::kBF16, 1, rounded_begin + n);
      AdamWOptions options;
      options.weight_decay = 0.1;
      options.grad_scale = 0.37;
      KernelTest host;
      for (int step = 1; step <= 3; ++step) {
        options.step = step;
        options.learning_rate = 0.01 * step;
        // From ordinary gradients to some whose squares are subnormal or zero.
        Matrix grad = Matrix::Random(1, n, rng);
        for (int64_t i = 0; i < n; i += 3) grad.at(0, i) *= i % 2 == 0 ? 1e-20F : 1e-30F;
        const DeviceMatrix g(DType::kF32, shifted(grad));
        AdamWStep(host.ctx(), param.vector(), grad.vector(), exp_avg.vector(), exp_avg_sq.vector(),
                  options);
        AdamWStep(
            ctx(), part(p), part(g), part(m), part(v), options,
            step == 2 ? sala::Tensor() : rounded.vector().Rows(rounded_begin, rounded_begin + n));
        EXPECT_TRUE(p.Download().SameBits(shifted(param)));
        EXPECT_TRUE(m.Download().SameBits(shifted(exp_avg)));
        EXPECT_TRUE(v.Download().SameBits(shifted(exp_avg_sq)));
      }
      const Matrix found = rounded.Download();
      for (int64_t i = 0; i < rounded_begin; ++i) EXPECT_TRUE(std::isnan(found.at(0, i)));
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(found.at(0, rounded_begin + i), static_cast<float>(BF16(param.at(0, i))));
      }
      EXPECT_TRUE(rounded.GapsUntouched() && p.GapsUntouched());
    }
  }
}

TEST_F(AdamWCuda, FollowsTheDoubleReference) {
  std::mt19937 rng(82);
  const int64_t n = 129;
  const Matrix param = Matrix::Random(1, n, rng);
  const DeviceMatrix p(DType::kF32, param), m(DType::kF32, Matrix::Filled(1, n, 0)),
      v(DType::kF32, Matrix::Filled(1, n, 0));
  auto pd = param.values();
  std::vector<double> md(pd.size(), 0.0), vd(pd.size(), 0.0);
  AdamWOptions options;
  options.learning_rate = 0.01;
  options.weight_decay = 0.1;
  const int steps = 5;
  for (int step = 1; step <= steps; ++step) {
    options.step = step;
    const Matrix grad = Matrix::Random(1, n, rng);
    const DeviceMatrix g(DType::kF32, grad);
    AdamWStep(ctx(), p.vector(), g.vector(), m.vector(), v.vector(), options);
    reference::AdamWStep(n, grad.values().data(), pd.data(), md.data(), vd.data(), options);
  }
  // As on a CPU: four roundings of numbers up to 4 in each step's moments; a parameter up to 5 is
  // rounded three times a step, and a step of up to 0.01 * 4 carries the moments' errors.
  ExpectClose(m.Download(), md, [&](size_t) { return 4 * steps * kF32Round * 4; });
  ExpectClose(v.Download(), vd, [&](size_t i) { return 4 * steps * kF32Round * vd[i] + 1e-12; });
  ExpectClose(p.Download(), pd,
              [&](size_t) { return steps * kF32Round * (3 * 5 + 120 * 0.01 * 4); });
}

}  // namespace
}  // namespace sala::kernels
