// Operations on no tokens, on the CPU.
#include "tests/kernels/common/zero_rows.h"

namespace sala::kernels {
namespace {

TEST(ZeroRows, Products) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).Products();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

TEST(ZeroRows, Norms) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).Norms();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

TEST(ZeroRows, HeadNormsAndRotations) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).HeadNormsAndRotations();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

TEST(ZeroRows, Gates) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).Gates();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

TEST(ZeroRows, WholeTensors) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).WholeTensors();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

TEST(ZeroRows, Embeddings) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).Embeddings();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

TEST(ZeroRows, Losses) {
  KernelTest kernel(2);
  ZeroRows(kernel.ctx()).Losses();
  EXPECT_EQ(kernel.arena().used_bytes(), 0U);
}

}  // namespace
}  // namespace sala::kernels
