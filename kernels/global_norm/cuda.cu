// Sum of squares on the GPU: bound by memory. A block sums a piece of fixed size in float64, a
// second launch joins the pieces in a fixed tree, so the bits do not depend on the device.
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 16384;

// Thread i takes the elements [4 i, 4 i + 4) of every 1024, in one access where `aligned`.
__global__ void __launch_bounds__(kThreads)
    PieceKernel(const float* x, int64_t count, bool aligned, double* parts) {
  SharedMemory shared;
  double* slots = shared.Take<double>(kThreads / kWarp);
  const int64_t end = min(count, (int64_t{blockIdx.x} + 1) * kPiece);
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kPiece + int64_t{threadIdx.x} * 4; i < end;
       i += 4 * kThreads) {
    float v[4] = {};
    if (aligned && i + 4 <= end) {
      const float4 four = *reinterpret_cast<const float4*>(x + i);
      v[0] = four.x;
      v[1] = four.y;
      v[2] = four.z;
      v[3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j < end) v[j] = x[i + j];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += static_cast<double>(v[j]) * static_cast<double>(v[j]);
  }
  sum = BlockSum(sum, slots);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

}  // namespace

double cuda::SumOfSquares(const Context& ctx, const ConstTensor& x) {
  const Op op(ctx, "SumOfSquares", x);
  SALA_CHECK(x.contiguous()) << "not contiguous: " << ShapeText(x);
  const int64_t count = x.numel();
  if (count == 0) return 0;
  const ArenaScope scope(*ctx.scratch);
  const int64_t pieces = CeilDiv(count, kPiece);
  auto* parts = op.Data<double>(ctx.scratch->New(DType::kF64, {pieces}));
  auto* total = op.Data<double>(ctx.scratch->New(DType::kF64, {1}));
  op.Launch(PieceKernel, dim3(static_cast<unsigned>(pieces)), dim3(kThreads),
            SharedBytes<double>(kThreads / kWarp), op.Data<float>(x), count, Aligned16(x.raw()),
            parts);
  SumParts(op, parts, 1, pieces, total);
  double host = 0;
  ctx.gpu->Download(&host, total, sizeof(host));
  return host;
}

}  // namespace sala::kernels
