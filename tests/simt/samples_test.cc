// Whole kernels against double references, in every order of lanes, warps and blocks that is tried.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/simt/sample_kernels.h"

namespace {

using simt_samples::GemmKernel;
using simt_samples::NormKernel;

std::vector<__nv_bfloat16> RandomBf16(size_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> values(count);
  for (auto& value : values) value = __float2bfloat16(normal(generator));
  return values;
}

class Samples : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    simt::options().seed = static_cast<uint64_t>(GetParam());
    simt::options().os_threads = GetParam() == 17 ? 3 : 1;
  }
  void TearDown() override {
    simt::options().seed = 0;
    simt::options().os_threads = 1;
  }
};

TEST_P(Samples, Gemm) {
  const int m = 100;
  const int n = 72;
  const int k = 192;
  const auto a = RandomBf16(m * k, 1);
  const auto b = RandomBf16(n * k, 2);
  std::vector<float> c(m * n, NAN);
  simt::Launch("gemm", dim3((n + 63) / 64, (m + 63) / 64), dim3(128),
               simt_samples::kGemmSharedBytes, nullptr, GemmKernel, a.data(), b.data(), c.data(), m,
               n, k);
  cudaDeviceSynchronize();
  double worst = 0.0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0.0;
      for (int p = 0; p < k; ++p) {
        sum += double{__bfloat162float(a[i * k + p])} * double{__bfloat162float(b[j * k + p])};
      }
      worst = std::fmax(worst, std::abs(sum - double{c[i * n + j]}));
      ASSERT_FALSE(std::isnan(c[i * n + j])) << i << " " << j;
    }
  }
  EXPECT_LT(worst, 1e-4);
}

TEST_P(Samples, Norm) {
  const int rows = 9;
  const int n = 333;
  std::vector<float> x(rows * n);
  std::vector<float> y(rows * n, NAN);
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(generator);
  simt::Launch("norm", dim3(rows), dim3(128), 128, nullptr, NormKernel<float>, x.data(), y.data(),
               n, 1e-5F);
  cudaDeviceSynchronize();
  for (int row = 0; row < rows; ++row) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += double{x[row * n + i]} * double{x[row * n + i]};
    for (int i = 0; i < n; ++i) {
      EXPECT_NEAR(y[row * n + i], double{x[row * n + i]} / std::sqrt(sum / n + 1e-5), 1e-6);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Orders, Samples, testing::Values(0, 1, 2, 17));

}  // namespace
