// The stand-in for cuBLASLt against a plain loop: transposes, types, leading dimensions, alpha and
// beta, in place and not, and what it refuses.
#include <cublasLt.h>

#include <cmath>
#include <random>
#include <tuple>

#include "tests/simt/launch.h"

namespace {

using simt_test::DeviceArray;

// A column-major matrix on the device with its values in double.
class Matrix {
 public:
  Matrix(cudaDataType type, int rows, int columns, int ld, int seed)
      : type_(type), ld_(ld), size_(static_cast<size_t>(ld) * columns), values_(size_) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> floats(size_);
    std::vector<__nv_bfloat16> halves(size_);
    for (size_t i = 0; i < size_; ++i) {
      floats[i] = normal(generator);
      halves[i] = __float2bfloat16(floats[i]);
      values_[i] = type == CUDA_R_32F ? floats[i] : __bfloat162float(halves[i]);
    }
    const size_t bytes = size_ * (type == CUDA_R_32F ? 4 : 2);
    EXPECT_EQ(cudaMalloc(&data_, bytes), cudaSuccess);
    EXPECT_EQ(
        cudaMemcpy(data_, type == CUDA_R_32F ? static_cast<void*>(floats.data()) : halves.data(),
                   bytes, cudaMemcpyHostToDevice),
        cudaSuccess);
    EXPECT_EQ(cublasLtMatrixLayoutCreate(&layout_, type, rows, columns, ld), CUBLAS_STATUS_SUCCESS);
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  ~Matrix() {
    cublasLtMatrixLayoutDestroy(layout_);
    cudaFree(data_);
  }

  double At(int row, int column) const { return values_[static_cast<size_t>(column) * ld_ + row]; }
  double Before(size_t i) const { return values_[i]; }
  double Now(size_t i) const {
    return type_ == CUDA_R_32F ? static_cast<const float*>(data_)[i]
                               : __bfloat162float(static_cast<const __nv_bfloat16*>(data_)[i]);
  }
  void* data() const { return data_; }
  cublasLtMatrixLayout_t layout() const { return layout_; }

 private:
  cudaDataType type_;
  int ld_;
  size_t size_;
  std::vector<double> values_;
  void* data_ = nullptr;
  cublasLtMatrixLayout_t layout_ = nullptr;
};

class CublasLt : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cublasLtCreate(&handle_), CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(cublasLtMatmulDescCreate(&description_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
              CUBLAS_STATUS_SUCCESS);
  }
  void TearDown() override {
    cublasLtMatmulDescDestroy(description_);
    cublasLtDestroy(handle_);
  }
  void SetTransposes(bool a, bool b) {
    const cublasOperation_t op_a = a ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = b ? CUBLAS_OP_T : CUBLAS_OP_N;
    ASSERT_EQ(cublasLtMatmulDescSetAttribute(description_, CUBLASLT_MATMUL_DESC_TRANSA, &op_a,
                                             sizeof op_a),
              CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(cublasLtMatmulDescSetAttribute(description_, CUBLASLT_MATMUL_DESC_TRANSB, &op_b,
                                             sizeof op_b),
              CUBLAS_STATUS_SUCCESS);
  }
  cublasStatus_t Multiply(float alpha, const Matrix& a, const Matrix& b, float beta,
                          const Matrix& c, const Matrix& d) {
    return cublasLtMatmul(handle_, description_, &alpha, a.data(), a.layout(), b.data(), b.layout(),
                          &beta, c.data(), c.layout(), d.data(), d.layout(), nullptr, nullptr, 0,
                          nullptr);
  }

  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t description_ = nullptr;
};

struct Types {
  cudaDataType in;
  cudaDataType out;
};
constexpr Types kTypes[] = {
    {CUDA_R_16BF, CUDA_R_16BF}, {CUDA_R_16BF, CUDA_R_32F}, {CUDA_R_32F, CUDA_R_32F}};

class Product : public CublasLt,
                public testing::WithParamInterface<std::tuple<bool, bool, int, int>> {};

TEST_P(Product, MatchesAPlainLoop) {
  const auto [ta, tb, type, gap] = GetParam();
  const int m = 13;
  const int n = 21;
  const int k = 34;
  SetTransposes(ta, tb);
  const Types types = kTypes[type];
  const Matrix a(types.in, ta ? k : m, ta ? m : k, (ta ? k : m) + gap, 1);
  const Matrix b(types.in, tb ? n : k, tb ? k : n, (tb ? n : k) + 2 * gap, 2);
  const Matrix c(types.out, m, n, m + 3 * gap, 3);
  const Matrix d(types.out, m, n, m + gap, 4);
  for (const bool in_place : {false, true}) {
    for (const float beta : {0.0F, 1.0F, -0.5F}) {
      const Matrix fresh(types.out, m, n, m + 3 * gap, 3);
      const Matrix& to = in_place ? fresh : d;
      ASSERT_EQ(Multiply(1.5F, a, b, beta, in_place ? fresh : c, to), CUBLAS_STATUS_SUCCESS);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      const int ld = in_place ? m + 3 * gap : m + gap;
      for (int j = 0; j < n; ++j) {
        for (int i = 0; i < m; ++i) {
          double sum = 0.0;
          for (int p = 0; p < k; ++p)
            sum += (ta ? a.At(p, i) : a.At(i, p)) * (tb ? b.At(j, p) : b.At(p, j));
          const double expected = 1.5 * sum + double{beta} * c.At(i, j);
          // A bf16 result is rounded, and so is what C is added to.
          const double rounded = std::fabs(expected) + (beta != 0.0F ? std::fabs(1.5 * sum) : 0.0);
          const double tolerance = types.out == CUDA_R_32F ? 2e-5 : std::ldexp(rounded, -8) + 2e-5;
          ASSERT_NEAR(to.Now(static_cast<size_t>(j) * ld + i), expected, tolerance);
        }
        for (int i = m; i < ld; ++i) {  // between the columns nothing changes
          ASSERT_EQ(to.Now(static_cast<size_t>(j) * ld + i),
                    to.Before(static_cast<size_t>(j) * ld + i));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Product,
                         testing::Combine(testing::Bool(), testing::Bool(),
                                          testing::Values(0, 1, 2), testing::Values(0, 3)));

TEST_F(CublasLt, RunsWithItsStream) {
  const Matrix a(CUDA_R_32F, 4, 4, 4, 1);
  const Matrix d(CUDA_R_32F, 4, 4, 4, 2);
  ASSERT_EQ(Multiply(1.0F, a, a, 0.0F, d, d), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(simt_test::Peek(static_cast<const float*>(d.data())), static_cast<float>(d.Before(0)));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_NE(d.Now(0), d.Before(0));
}

// As measured on an H100 (docs/decisions.md).
TEST_F(CublasLt, WhatIsAddedToABf16ResultIsRoundedFirst) {
  constexpr int kSide = 16;
  const Matrix a(CUDA_R_16BF, kSide, kSide, kSide, 1);
  const Matrix b(CUDA_R_16BF, kSide, kSide, kSide, 2);
  const Matrix c(CUDA_R_16BF, kSide, kSide, kSide, 3);
  const Matrix d(CUDA_R_16BF, kSide, kSide, kSide, 4);
  ASSERT_EQ(Multiply(1.0F, a, b, 1.0F, c, d), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto round = [](double x) {
    return double{__bfloat162float(__float2bfloat16(static_cast<float>(x)))};
  };
  int others = 0;  // results that one rounding would give otherwise
  for (int j = 0; j < kSide; ++j) {
    for (int i = 0; i < kSide; ++i) {
      double sum = 0.0;
      for (int p = 0; p < kSide; ++p) sum += a.At(i, p) * b.At(p, j);
      const double found = d.Now(static_cast<size_t>(j) * kSide + i);
      ASSERT_EQ(found, round(round(sum) + c.At(i, j))) << i << ", " << j;
      others += found != round(sum + c.At(i, j));
    }
  }
  EXPECT_GT(others, kSide);
}

TEST_F(CublasLt, WithBetaZeroTheOldValueIsNotRead) {
  const Matrix a(CUDA_R_32F, 4, 4, 4, 1);
  const Matrix d(CUDA_R_32F, 4, 4, 4, 2);
  ASSERT_EQ(cudaMemset(d.data(), 0xff, 64), cudaSuccess);
  ASSERT_EQ(Multiply(1.0F, a, a, 0.0F, d, d), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  for (size_t i = 0; i < 16; ++i) EXPECT_FALSE(std::isnan(d.Now(i)));
}

TEST_F(CublasLt, HeuristicOffersAlgorithmsThatFitTheWorkspace) {
  const Matrix a(CUDA_R_16BF, 8, 8, 8, 1);
  const Matrix d(CUDA_R_16BF, 8, 8, 8, 2);
  cublasLtMatmulPreference_t preference = nullptr;
  ASSERT_EQ(cublasLtMatmulPreferenceCreate(&preference), CUBLAS_STATUS_SUCCESS);
  const auto offered = [&](size_t limit) {
    EXPECT_EQ(cublasLtMatmulPreferenceSetAttribute(
                  preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit, sizeof limit),
              CUBLAS_STATUS_SUCCESS);
    std::vector<cublasLtMatmulHeuristicResult_t> results(8);
    int found = 0;
    EXPECT_EQ(
        cublasLtMatmulAlgoGetHeuristic(handle_, description_, a.layout(), a.layout(), d.layout(),
                                       d.layout(), preference, 8, results.data(), &found),
        CUBLAS_STATUS_SUCCESS);
    results.resize(found);
    return results;
  };
  EXPECT_EQ(offered(0).size(), 1U);
  const auto all = offered(32 << 20);
  ASSERT_EQ(all.size(), 3U);
  const DeviceArray<char> workspace(all[0].workspaceSize);
  const float one = 1.0F;
  const float zero = 0.0F;
  std::vector<double> first;
  for (const auto& choice : all) {
    ASSERT_EQ(cublasLtMatmul(handle_, description_, &one, a.data(), a.layout(), a.data(),
                             a.layout(), &zero, d.data(), d.layout(), d.data(), d.layout(),
                             &choice.algo, workspace.data(), choice.workspaceSize, nullptr),
              CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    std::vector<double> result;
    for (size_t i = 0; i < 64; ++i) result.push_back(d.Now(i));
    if (first.empty()) first = result;
    EXPECT_EQ(result, first);
  }
  EXPECT_EQ(cublasLtMatmul(handle_, description_, &one, a.data(), a.layout(), a.data(), a.layout(),
                           &zero, d.data(), d.layout(), d.data(), d.layout(), &all[0].algo,
                           workspace.data(), 16, nullptr),
            CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cublasLtMatmulPreferenceDestroy(preference), CUBLAS_STATUS_SUCCESS);
}

TEST_F(CublasLt, RefusesWhatDoesNotFit) {
  const Matrix a(CUDA_R_32F, 4, 6, 4, 1);
  const Matrix b(CUDA_R_32F, 6, 5, 6, 1);
  const Matrix d(CUDA_R_32F, 4, 5, 4, 2);
  const Matrix half(CUDA_R_16BF, 6, 5, 6, 1);
  EXPECT_EQ(Multiply(1.0F, a, b, 0.0F, d, d), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(Multiply(1.0F, b, a, 0.0F, d, d), CUBLAS_STATUS_INVALID_VALUE);  // inner sizes
  EXPECT_EQ(Multiply(1.0F, a, b, 0.0F, d, b), CUBLAS_STATUS_INVALID_VALUE);  // size of D
  EXPECT_EQ(Multiply(1.0F, a, half, 0.0F, d, d), CUBLAS_STATUS_NOT_SUPPORTED);
  const int64_t short_ld = 3;
  ASSERT_EQ(cublasLtMatrixLayoutSetAttribute(a.layout(), CUBLASLT_MATRIX_LAYOUT_LD, &short_ld,
                                             sizeof short_ld),
            CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(Multiply(1.0F, a, b, 0.0F, d, d), CUBLAS_STATUS_INVALID_VALUE);
  const int32_t wrong_size = 4;
  EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(a.layout(), CUBLASLT_MATRIX_LAYOUT_LD, &wrong_size,
                                             sizeof wrong_size),
            CUBLAS_STATUS_INVALID_VALUE);
  const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_RELU;
  ASSERT_EQ(cublasLtMatmulDescSetAttribute(description_, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                           sizeof epilogue),
            CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(Multiply(1.0F, b, a, 0.0F, d, d), CUBLAS_STATUS_INVALID_VALUE);
  cudaDeviceSynchronize();
}

}  // namespace
