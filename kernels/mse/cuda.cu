// Squared error on the GPU: bound by memory (by float64 where a device is slow at it); one pass
// over the rows writes the gradient and a partial result per block, a second launch joins those in
// a fixed tree. The number of blocks depends on the shape only.
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int64_t kMostBlocks = 1024;
constexpr int kSums = 3;  // of squared errors, of the target, of its squares

struct Rows {
  const Bf16* y;
  int64_t y_stride;
  const Bf16* target;
  int64_t target_stride;
  Bf16* dy;  // may be null
  int64_t dy_stride;
  float factor;
  int64_t count, width;
};

// parts [kSums, gridDim.x]
__global__ void __launch_bounds__(kPackThreads, 4) RowsKernel(Rows rows, double* parts) {
  SharedMemory shared;
  double* slots = shared.Take<double>(kPackThreads / kWarp);
  double sums[kSums] = {};
  for (PackLoop i(rows.count, rows.width / 8); i.more(); i.Next()) {
    float y[8], target[8];
    Load8(rows.y + i.row * rows.y_stride + i.column(), y);
    Load8(rows.target + i.row * rows.target_stride + i.column(), target);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const double t = target[j];
      const double difference = static_cast<double>(y[j]) - t;
      sums[0] += difference * difference;
      sums[1] += t;
      sums[2] += t * t;
      y[j] = rows.factor * (y[j] - target[j]);
    }
    if (rows.dy != nullptr) Store8(rows.dy + i.row * rows.dy_stride + i.column(), y);
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const double sum = BlockSum(sums[s], slots);
    if (threadIdx.x == 0) parts[int64_t{s} * gridDim.x + blockIdx.x] = sum;
  }
}

}  // namespace

MseResult cuda::MeanSquaredError(const Context& ctx, const ConstTensor& y,
                                 const ConstTensor& target, float grad_scale, const Tensor& dy) {
  const Op op(ctx, "MeanSquaredError", y);
  SALA_CHECK(y.rank() == 2) << ShapeText(y);
  CheckPackedMatrix(y, y.dim(0), y.dim(1));
  CheckPackedMatrix(target, y.dim(0), y.dim(1));
  if (!dy.empty()) CheckPackedMatrix(dy, y.dim(0), y.dim(1));
  MseResult result;
  result.elements = y.numel();
  if (result.elements == 0) return result;
  const ArenaScope scope(*ctx.scratch);
  // Four packs a thread at least.
  const int64_t blocks = std::min(CeilDiv(y.numel() / 8, 4 * kPackThreads), kMostBlocks);
  auto* parts = op.Data<double>(ctx.scratch->New(DType::kF64, {kSums, blocks}));
  auto* totals = op.Data<double>(ctx.scratch->New(DType::kF64, {kSums}));
  const Rows rows = {.y = op.Data<Bf16>(y),
                     .y_stride = y.stride(0),
                     .target = op.Data<Bf16>(target),
                     .target_stride = target.stride(0),
                     .dy = op.Data<Bf16>(dy),
                     .dy_stride = dy.stride(0),
                     .factor = 2.0F * grad_scale,
                     .count = y.dim(0),
                     .width = y.dim(1)};
  op.Launch(RowsKernel, dim3(static_cast<unsigned>(blocks)), dim3(kPackThreads),
            SharedBytes<double>(kPackThreads / kWarp), rows, parts);
  SumParts(op, parts, kSums, blocks, totals);
  double host[kSums] = {};
  ctx.gpu->Download(host, totals, sizeof(host));
  result.squared_error = host[0];
  result.target_sum = host[1];
  result.target_square = host[2];
  return result;
}

}  // namespace sala::kernels
