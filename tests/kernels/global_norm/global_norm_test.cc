#include "kernels/global_norm/global_norm.h"

#include "kernels/global_norm/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {
namespace {

TEST(GlobalNorm, AgreesWithReferenceAndIgnoresThreads) {
  std::mt19937 rng(4);
  for (int64_t n : {0, 1, 15, 16, 17, 65535, 65536, 65537, 200001}) {
    Matrix x = Matrix::Random(1, n, rng);
    const auto values = x.values();
    const double expected = reference::SumOfSquares(n, values.data());
    KernelTest one(1);
    KernelTest three(3);
    const double found = SumOfSquares(one.ctx(), x.vector());
    // Squares of float32 are exact in double; n additions of positive terms.
    EXPECT_NEAR(found, expected, static_cast<double>(n + 1) * 0x1p-52 * expected);
    EXPECT_EQ(found, SumOfSquares(three.ctx(), x.vector()));
  }
}

TEST(GlobalNorm, PassesInfinityAndNotANumberThrough) {
  Matrix x = Matrix::Filled(1, 70000, 1.0F);
  KernelTest test;
  EXPECT_EQ(SumOfSquares(test.ctx(), x.vector()), 70000.0);
  x.at(0, 69999) = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(SumOfSquares(test.ctx(), x.vector()), std::numeric_limits<double>::infinity());
  x.at(0, 3) = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(SumOfSquares(test.ctx(), x.vector())));
}

}  // namespace
}  // namespace sala::kernels
