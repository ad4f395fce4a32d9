#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"
#include "kernels/global_norm/global_norm.h"

namespace sala::kernels {
namespace {

constexpr int64_t kPiece = 65536;  // elements of one partial sum

SALA_INLINE double SumPieceBody(int64_t n, const float* x) {
  return LaneSum<double>(n, [x](int64_t i) {
    const double value = x[i];
    return value * value;
  });
}
constexpr Vectorized<SumPieceBody> SumPiece{};

}  // namespace

double SumOfSquares(const Context& ctx, const ConstTensor& x) {
  if (ctx.cuda()) return Cuda(ctx).SumOfSquares(ctx, x);
  CheckCpu(ctx);
  SALA_CHECK(x.contiguous()) << "not contiguous: " << ShapeText(x);
  const int64_t n = x.numel();
  if (n == 0) return 0;
  const auto* data = x.Data<float>();
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  const ArenaScope scope(*ctx.scratch);
  auto* sums = ctx.scratch->New(DType::kF64, {pieces}).Data<double>();
  ctx.pool->For(n, kPiece, [&](int64_t begin, int64_t end) {
    sums[begin / kPiece] = SumPiece(end - begin, data + begin);
  });
  double total = 0;
  for (int64_t p = 0; p < pieces; ++p) total += sums[p];
  return total;
}

}  // namespace sala::kernels
