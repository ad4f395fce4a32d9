#include "kernels/tensor_ops/tensor_ops.h"
#include "tests/kernels/common/cuda_bounds.h"

namespace sala::kernels {
namespace {

using TensorOpsCuda = CudaKernelTest;

const std::vector<int64_t>& Sizes() {
  static const std::vector<int64_t> sizes = {
      0, 1, 7, 8, 9, 255, 256, 2049, kSlowBuild ? 15 : 40003};
  return sizes;
}

Matrix Rounded(const Matrix& from) {
  Matrix to(from.rows(), from.columns());
  for (int64_t i = 0; i < from.columns(); ++i) {
    to.at(0, i) = static_cast<float>(BF16(from.at(0, i)));
  }
  return to;
}

// Elements [begin, begin + n) of a buffer, so that addresses are on no boundary.
sala::Tensor Part(const DeviceMatrix& m, int64_t begin, int64_t n) {
  return m.vector().Rows(begin, begin + n);
}

TEST_F(TensorOpsCuda, CastRoundsToNearestEvenAndTouchesNothingElse) {
  std::mt19937 rng(64);
  for (int64_t n : Sizes()) {
    for (int64_t begin : {0, 1, 4, 8}) {  // 4: 16 bytes of float32, 8 of bfloat16
      Matrix values = Matrix::Random(1, n + begin, rng);
      if (n > 6) {
        const float special[] = {0x1.01p0F, 0x1.03p0F, -0.0F, 3.4e38F, 1e-40F, INFINITY};
        for (int64_t i = 0; i < 6; ++i) values.at(0, begin + i) = special[i];  // two ties first
      }
      const Matrix rounded = Rounded(values);
      for (DType source : {DType::kF32, DType::kBF16}) {
        for (DType target : {DType::kF32, DType::kBF16}) {
          const DeviceMatrix from(source, values), to(target, 1, n + begin + 3);
          Cast(ctx(), Part(from, begin, n), Part(to, begin, n));
          const Matrix found = to.Download();
          const Matrix& expected =
              source == DType::kF32 && target == DType::kF32 ? values : rounded;
          for (int64_t i = 0; i < found.columns(); ++i) {
            if (i < begin || i >= begin + n) {
              ASSERT_TRUE(std::isnan(found.at(0, i))) << i;
            } else {
              ASSERT_EQ(found.at(0, i), expected.at(0, i)) << i;
            }
          }
        }
      }
    }
  }
}

TEST_F(TensorOpsCuda, AddRoundsOnce) {
  std::mt19937 rng(65);
  for (int64_t n : Sizes()) {
    for (int64_t begin : {0, 3, 8}) {
      for (DType dtype : {DType::kF32, DType::kBF16}) {
        const Matrix term = RandomBf16(1, n + begin, rng);
        const Matrix sum = RandomBf16(1, n + begin, rng, 100.0F);
        const DeviceMatrix t(dtype, term), s(dtype, sum);
        Add(ctx(), Part(t, begin, n), Part(s, begin, n));
        Matrix expected = sum;
        for (int64_t i = begin; i < n + begin; ++i) expected.at(0, i) += term.at(0, i);
        if (dtype == DType::kBF16) expected = Rounded(expected);
        EXPECT_TRUE(s.Download().SameBits(expected));
        EXPECT_TRUE(s.GapsUntouched());
      }
    }
  }
}

TEST_F(TensorOpsCuda, CopyColumnsCopiesStridedRowsAndNothingElse) {
  std::mt19937 rng(66);
  for (int64_t rows : {0, 1, 5, kSlowBuild ? 40 : 3001}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      const Matrix values = RandomBf16(rows, 40, rng);
      const Matrix old = RandomBf16(rows, 64, rng);
      const DeviceMatrix from(dtype, values, 8), to(dtype, old, 16);
      CopyColumns(ctx(), from.tensor().Columns(8, 32), to.tensor().Columns(40, 64));
      Matrix expected = old;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < 24; ++c) expected.at(r, 40 + c) = values.at(r, 8 + c);
      }
      EXPECT_TRUE(to.Download().SameBits(expected));
      EXPECT_TRUE(to.GapsUntouched());
    }
  }
}

using TensorOpsCudaDeathTest = TensorOpsCuda;

TEST_F(TensorOpsCudaDeathTest, RefusesColumnsThatAreNoWholeUnits) {
  const DeviceMatrix a(DType::kBF16, 2, 16), b(DType::kBF16, 2, 16);
  EXPECT_DEATH(CopyColumns(ctx(), a.tensor().Columns(4, 12), b.tensor().Columns(0, 8)),
               "expected rows of whole units of 16 bytes");
}

TEST_F(TensorOpsCudaDeathTest, RefusesSumsOfTwoTypes) {
  const DeviceMatrix a(DType::kF32, 1, 8), b(DType::kBF16, 1, 8);
  EXPECT_DEATH(Add(ctx(), a.vector(), b.vector()), "found \\[8\\] f32 and \\[8\\] bf16, expected");
}

}  // namespace
}  // namespace sala::kernels
