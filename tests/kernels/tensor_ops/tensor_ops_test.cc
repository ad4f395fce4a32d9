#include "kernels/tensor_ops/tensor_ops.h"

#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

const std::vector<int64_t>& Sizes() {
  static const std::vector<int64_t> sizes = {0, 1, 7, 64, 16384, 16385, 40000};
  return sizes;
}

TEST(TensorOps, CastOfOneTypeIsACopy) {
  std::mt19937 rng(61);
  for (int64_t n : Sizes()) {
    Matrix from = Matrix::Random(1, n, rng);
    Matrix to(1, n);
    KernelTest test;
    Cast(test.ctx(), from.vector(), to.vector());
    EXPECT_TRUE(to.SameBits(from));
    EXPECT_TRUE(to.GapsUntouched());
  }
}

TEST(TensorOps, AddIsOneAdditionAnElementForAnyThreads) {
  std::mt19937 rng(62);
  for (int64_t n : Sizes()) {
    for (int threads : {1, 3}) {
      Matrix term = Matrix::Random(1, n, rng);
      Matrix sum = Matrix::Random(1, n, rng);
      Matrix expected = sum;
      for (int64_t i = 0; i < n; ++i) expected.at(0, i) += term.at(0, i);
      KernelTest test(threads);
      Add(test.ctx(), term.vector(), sum.vector());
      EXPECT_TRUE(sum.SameBits(expected));
      EXPECT_TRUE(sum.GapsUntouched());
    }
  }
}

TEST(TensorOps, CopyColumnsCopiesStridedRowsAndNothingElse) {
  std::mt19937 rng(63);
  for (int64_t rows : {0, 1, 5, 300}) {
    for (int threads : {1, 3}) {
      Matrix from = Matrix::Random(rows, 12, rng, 3);
      Matrix to = Matrix::Random(rows, 20, rng, 1);
      Matrix expected = to;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < 7; ++c) expected.at(r, 9 + c) = from.at(r, 2 + c);
      }
      KernelTest test(threads);
      CopyColumns(test.ctx(), from.tensor().Columns(2, 9), to.tensor().Columns(9, 16));
      EXPECT_TRUE(to.SameBits(expected));
      EXPECT_TRUE(to.GapsUntouched());
    }
  }
}

TEST(TensorOpsDeathTest, RefusesTensorsThatDoNotFit) {
  KernelTest test;
  Matrix a(1, 4), b(1, 5), strided(2, 2, 1);
  EXPECT_DEATH(Cast(test.ctx(), a.vector(), b.vector()),
               "\\[4\\] f32 and \\[5\\] f32 must be contiguous and of one size");
  EXPECT_DEATH(Add(test.ctx(), strided.tensor(), a.vector()), "must be contiguous");
}

}  // namespace
}  // namespace sala::kernels
