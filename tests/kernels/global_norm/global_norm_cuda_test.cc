#include "kernels/global_norm/global_norm.h"
#include "kernels/global_norm/reference.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {
namespace {

using SumOfSquaresCuda = CudaKernelTest;

TEST_F(SumOfSquaresCuda, AgreesWithReferenceWhereverTheBufferBegins) {
  std::mt19937 rng(91);
  for (int64_t n : {0, 1, 3, 4, 5, 1023, 1025, kSlowBuild ? 16385 : 16384 * 9 + 5}) {
    const Matrix x = Matrix::Random(1, n, rng);
    const auto values = x.values();
    const double expected = reference::SumOfSquares(n, values.data());
    double first = 0;
    for (int64_t begin : {0, 1, 2, 4}) {
      Matrix shifted = Matrix::Filled(1, begin + n, 7.0F);
      for (int64_t i = 0; i < n; ++i) shifted.at(0, begin + i) = x.at(0, i);
      const DeviceMatrix device(DType::kF32, shifted);
      const double found = SumOfSquares(ctx(), device.vector().Rows(begin, begin + n));
      // n roundings of double, here and in the reference.
      EXPECT_NEAR(found, expected, 2 * static_cast<double>(n) * 0x1p-53 * expected);
      if (begin == 0) first = found;
      EXPECT_EQ(found, first) << "begin " << begin;
    }
  }
}

// More pieces of 16384 elements than the last sum has threads (512).
TEST_F(SumOfSquaresCuda, ManyPieces) {
  if (kSlowBuild) GTEST_SKIP() << "too slow with sanitizers";
  constexpr int64_t kElements = 520 * 16384 + 1;
  const DeviceMatrix ones(DType::kF32, Matrix::Filled(1, kElements, 1.0F));
  EXPECT_EQ(SumOfSquares(ctx(), ones.vector()), static_cast<double>(kElements));
}

TEST_F(SumOfSquaresCuda, PassesNotANumberAndInfinityThrough) {
  for (int64_t at : {0, 999, 16384, 20000}) {
    Matrix x = Matrix::Filled(1, 20001, 1.0F);
    x.at(0, at) = std::numeric_limits<float>::infinity();
    const DeviceMatrix infinite(DType::kF32, x);
    EXPECT_EQ(SumOfSquares(ctx(), infinite.vector()), std::numeric_limits<double>::infinity());
    x.at(0, at) = std::numeric_limits<float>::quiet_NaN();
    const DeviceMatrix nan(DType::kF32, x);
    EXPECT_TRUE(std::isnan(SumOfSquares(ctx(), nan.vector())));
    // Beyond the range of float32, but not of float64.
    x.at(0, at) = 1e30F;
    const DeviceMatrix large(DType::kF32, x);
    EXPECT_NEAR(SumOfSquares(ctx(), large.vector()), 1e60, 1e53);
  }
}

}  // namespace
}  // namespace sala::kernels
