// Operations on no tokens, on a GPU.
#include "tests/kernels/common/cuda_test.h"
#include "tests/kernels/common/zero_rows.h"

namespace sala::kernels {
namespace {

using ZeroRowsCuda = CudaKernelTest;

TEST_F(ZeroRowsCuda, Products) { ZeroRows(ctx()).Products(); }
TEST_F(ZeroRowsCuda, Norms) { ZeroRows(ctx()).Norms(); }
TEST_F(ZeroRowsCuda, HeadNormsAndRotations) { ZeroRows(ctx()).HeadNormsAndRotations(); }
TEST_F(ZeroRowsCuda, Gates) { ZeroRows(ctx()).Gates(); }
TEST_F(ZeroRowsCuda, WholeTensors) { ZeroRows(ctx()).WholeTensors(); }
TEST_F(ZeroRowsCuda, Embeddings) { ZeroRows(ctx()).Embeddings(); }
TEST_F(ZeroRowsCuda, Losses) { ZeroRows(ctx()).Losses(); }

}  // namespace
}  // namespace sala::kernels
