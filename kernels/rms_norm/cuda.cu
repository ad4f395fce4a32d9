// RMSNorm on the GPU. Bound by memory: each row is read once into registers of its block, which
// sums its squares and writes it out again; the residual form adds the branch on the way. The
// backward pass also adds up the gradient of the weight in registers, see cuda_rows.h.
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

struct Forward {
  const Bf16* x;  // or the residual, where there is a branch
  int64_t x_stride;
  const Bf16* branch;  // may be null
  int64_t branch_stride;
  float branch_scale;
  Bf16* sum;
  int64_t sum_stride;
  const Bf16* weight;
  float eps;
  Bf16* y;
  int64_t y_stride;
  float* rstd;
  int64_t width;
};

// The norm is that of the stored sum, rounded: the backward pass sees no other.
template <int kPacks>
__global__ void __launch_bounds__(kRowThreads) ForwardKernel(Forward f) {
  SharedMemory shared;
  float* slots = shared.Take<float>(kRowThreads / kWarp);
  const int64_t row = blockIdx.x;
  float x[kPacks][8];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = RowColumn(p);
    if (column >= f.width) continue;
    Load8(f.x + row * f.x_stride + column, x[p]);
    if (f.branch != nullptr) {
      float branch[8];
      Load8(f.branch + row * f.branch_stride + column, branch);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[p][j] += f.branch_scale * branch[j];
      const Bf16x8 rounded = Pack(x[p]);
      StorePack(f.sum + row * f.sum_stride + column, rounded);
      Unpack(rounded, x[p]);
    }
  }
  const float r = RstdOf(BlockSquare(x, f.width, slots), f.width, f.eps);
  if (threadIdx.x == 0) f.rstd[row] = r;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = RowColumn(p);
    if (column >= f.width) continue;
    float weight[8];
    Load8(f.weight + column, weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[p][j] *= r * weight[j];
    Store8(f.y + row * f.y_stride + column, x[p]);
  }
}

struct Backward {
  const Bf16* dy;
  int64_t dy_stride;
  const Bf16* x;
  int64_t x_stride;
  const Bf16* weight;
  const float* rstd;
  Bf16* dx;
  int64_t dx_stride;
  bool accumulate;
  float* parts;  // [gridDim.x, width] or null
  int64_t rows, width;
};

// dx_i = r (w_i dy_i - (x_i r) mean_j(w_j dy_j x_j r)),   dw_i = sum over rows of dy_i x_i r
// x_i r is of size 1 whatever the size of x; x_i r^3 would leave float32 from x = 1e15 on.
template <int kPacks>
__global__ void __launch_bounds__(kRowThreads) BackwardKernel(Backward b) {
  SharedMemory shared;
  float* slots = shared.Take<float>(kRowThreads / kWarp);
  float sums[kPacks][8] = {};
  for (int64_t row = blockIdx.x; row < b.rows; row += gridDim.x) {
    Bf16x8 dy_pack[kPacks], x_pack[kPacks];
    float dot = 0.0F;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = RowColumn(p);
      if (column >= b.width) continue;
      dy_pack[p] = LoadPack(b.dy + row * b.dy_stride + column);
      x_pack[p] = LoadPack(b.x + row * b.x_stride + column);
      float dy[8], x[8], weight[8];
      Unpack(dy_pack[p], dy);
      Unpack(x_pack[p], x);
      Load8(b.weight + column, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) dot += weight[j] * dy[j] * x[j];
    }
    dot = BlockSum(dot, slots);
    const float r = b.rstd[row];
    const float mean = dot * r / static_cast<float>(b.width);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = RowColumn(p);
      if (column >= b.width) continue;
      float dy[8], x[8], weight[8], dx[8] = {};
      Unpack(dy_pack[p], dy);
      Unpack(x_pack[p], x);
      Load8(b.weight + column, weight);
      Bf16* to = b.dx + row * b.dx_stride + column;
      if (b.accumulate) Load8(to, dx);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        dx[j] += r * (weight[j] * dy[j] - x[j] * r * mean);
        sums[p][j] += dy[j] * (x[j] * r);
      }
      Store8(to, dx);
    }
  }
  if (b.parts == nullptr) return;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = RowColumn(p);
    if (column < b.width) Store8(b.parts + blockIdx.x * b.width + column, sums[p]);
  }
}

void LaunchForward(const Op& op, const Forward& f, int64_t rows) {
  op.Launch(RowPacks(f.width) == 2 ? ForwardKernel<2> : ForwardKernel<4>,
            dim3(static_cast<unsigned>(rows)), dim3(RowThreads(f.width)),
            SharedBytes<float>(kRowThreads / kWarp), f);
}

}  // namespace

void cuda::RmsNormForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight,
                          float eps, const Tensor& y, const Tensor& rstd) {
  const Op op(ctx, "RmsNormForward", x);
  const int64_t rows = x.dim(0);
  const int64_t width = x.dim(1);
  for (const ConstTensor& m : {x, ConstTensor(y)}) CheckPackedMatrix(m, rows, width);
  CheckPackedVector(weight, width);
  CheckVector(rstd, rows);
  const Forward f = {.x = op.Data<Bf16>(x),
                     .x_stride = x.stride(0),
                     .branch = nullptr,
                     .branch_stride = 0,
                     .branch_scale = 0.0F,
                     .sum = nullptr,
                     .sum_stride = 0,
                     .weight = op.Data<Bf16>(weight),
                     .eps = eps,
                     .y = op.Data<Bf16>(y),
                     .y_stride = y.stride(0),
                     .rstd = op.Data<float>(rstd),
                     .width = width};
  LaunchForward(op, f, rows);
}

void cuda::RmsNormResidualForward(const Context& ctx, const ConstTensor& residual,
                                  const ConstTensor& branch, float branch_scale,
                                  const ConstTensor& weight, float eps, const Tensor& sum,
                                  const Tensor& y, const Tensor& rstd) {
  const Op op(ctx, "RmsNormResidualForward", sum);
  const int64_t rows = sum.dim(0);
  const int64_t width = sum.dim(1);
  for (const ConstTensor& m : {residual, branch, ConstTensor(sum), ConstTensor(y)}) {
    CheckPackedMatrix(m, rows, width);
  }
  CheckPackedVector(weight, width);
  CheckVector(rstd, rows);
  const Forward f = {.x = op.Data<Bf16>(residual),
                     .x_stride = residual.stride(0),
                     .branch = op.Data<Bf16>(branch),
                     .branch_stride = branch.stride(0),
                     .branch_scale = branch_scale,
                     .sum = op.Data<Bf16>(sum),
                     .sum_stride = sum.stride(0),
                     .weight = op.Data<Bf16>(weight),
                     .eps = eps,
                     .y = op.Data<Bf16>(y),
                     .y_stride = y.stride(0),
                     .rstd = op.Data<float>(rstd),
                     .width = width};
  LaunchForward(op, f, rows);
}

void cuda::RmsNormBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                           const ConstTensor& weight, const ConstTensor& rstd, const Tensor& dx,
                           Write write, const Tensor& dweight) {
  const Op op(ctx, "RmsNormBackward", x);
  const int64_t rows = x.dim(0);
  const int64_t width = x.dim(1);
  for (const ConstTensor& m : {dy, x, ConstTensor(dx)}) CheckPackedMatrix(m, rows, width);
  CheckPackedVector(weight, width);
  CheckVector(rstd, rows);
  if (!dweight.empty()) CheckVector(dweight, width);
  const ArenaScope scope(*ctx.scratch);
  // Without sums to keep, a row each.
  const int64_t pieces = dweight.empty() ? rows : RowPieces(rows);
  const Tensor parts = dweight.empty() ? Tensor() : ctx.scratch->New(DType::kF32, {pieces, width});
  const Backward b = {.dy = op.Data<Bf16>(dy),
                      .dy_stride = dy.stride(0),
                      .x = op.Data<Bf16>(x),
                      .x_stride = x.stride(0),
                      .weight = op.Data<Bf16>(weight),
                      .rstd = op.Data<float>(rstd),
                      .dx = op.Data<Bf16>(dx),
                      .dx_stride = dx.stride(0),
                      .accumulate = write == Write::kAccumulate,
                      .parts = op.Data<float>(parts),
                      .rows = rows,
                      .width = width};
  op.Launch(RowPacks(width) == 2 ? BackwardKernel<2> : BackwardKernel<4>,
            dim3(static_cast<unsigned>(pieces)), dim3(RowThreads(width)),
            SharedBytes<float>(kRowThreads / kWarp), b);
  if (!dweight.empty()) AddColumnSums(op, b.parts, pieces, width, op.Data<float>(dweight));
}

}  // namespace sala::kernels
