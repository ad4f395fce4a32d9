// Norm and gate after a mixer on the GPU. Bound by memory: with a norm a block holds each row in
// registers (cuda_rows.h), without one the work is element by element. The backward pass computes
// the gate and the normed value again instead of reading them.
//
// Where the columns are cut over ranks a kernel for the sum over the row goes before the kernel of
// the norm, with the exchange of one number a token between.
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

// One float a row: this rank's, and those of all ranks [ranks, rows].
struct RowNumbers {
  float* mine;
  const float* all;
  int ranks;
  int64_t rows;
  // In rank order.
  __device__ __forceinline__ float Total(int64_t row) const {
    float sum = 0.0F;
    for (int k = 0; k < ranks; ++k) sum += all[k * rows + row];
    return sum;
  }
  // Of numbers that BlockSquare gave, again such a number.
  __device__ __forceinline__ float TotalSquare(int64_t row) const {
    bool shrunk = false;
    float sum = 0.0F;
    float shrunk_sum = 0.0F;
    for (int k = 0; k < ranks; ++k) {
      const float square = all[k * rows + row];
      shrunk = shrunk || square < 0.0F;
      sum += square;
      shrunk_sum += square < 0.0F ? -square : square * kShrink * kShrink;
    }
    return shrunk || sum == INFINITY ? -shrunk_sum : sum;
  }
};

struct Forward {
  const Bf16* o;
  int64_t o_stride;
  const Bf16* weight;  // null: no norm
  const Bf16* z;       // null: no gate
  int64_t z_stride;
  float eps;
  Bf16* y;
  int64_t y_stride;
  float* rstd;
  int64_t rows, width;
  int64_t norm_width;  // of all ranks
  RowNumbers squares;
};

__global__ void __launch_bounds__(kPackThreads) GateForwardKernel(Forward f) {
  for (PackLoop i(f.rows, f.width / 8); i.more(); i.Next()) {
    float o[8], z[8];
    Load8(f.o + i.row * f.o_stride + i.column(), o);
    Load8(f.z + i.row * f.z_stride + i.column(), z);
#pragma unroll
    for (int j = 0; j < 8; ++j) o[j] *= FastSigmoid(z[j]);
    Store8(f.y + i.row * f.y_stride + i.column(), o);
  }
}

// A block a row, one sum for each.
__global__ void __launch_bounds__(kRowThreads) SquareKernel(Forward f) {
  SharedMemory shared;
  float* slots = shared.Take<float>(kRowThreads / kWarp);
  const int64_t row = blockIdx.x;
  const float square = BlockSquare(
      [&](float factor) {
        float sum = 0.0F;
        for (int64_t column = threadIdx.x * 8; column < f.width; column += blockDim.x * 8) {
          float o[8];
          Load8(f.o + row * f.o_stride + column, o);
          AddSquares(o, factor, sum);
        }
        return sum;
      },
      slots);
  if (threadIdx.x == 0) f.squares.mine[row] = square;
}

// A block a row whose sum over all ranks is there: no need to hold it in registers.
__global__ void __launch_bounds__(kRowThreads) CutForwardKernel(Forward f) {
  const int64_t row = blockIdx.x;
  const float r = RstdOf(f.squares.TotalSquare(row), f.norm_width, f.eps);
  if (threadIdx.x == 0) f.rstd[row] = r;
  for (int64_t column = threadIdx.x * 8; column < f.width; column += blockDim.x * 8) {
    float o[8], weight[8];
    Load8(f.o + row * f.o_stride + column, o);
    Load8(f.weight + column, weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) o[j] *= r * weight[j];
    if (f.z != nullptr) {
      float z[8];
      Load8(f.z + row * f.z_stride + column, z);
#pragma unroll
      for (int j = 0; j < 8; ++j) o[j] *= FastSigmoid(z[j]);
    }
    Store8(f.y + row * f.y_stride + column, o);
  }
}

template <int kPacks>
__global__ void __launch_bounds__(kRowThreads) NormForwardKernel(Forward f) {
  SharedMemory shared;
  float* slots = shared.Take<float>(kRowThreads / kWarp);
  const int64_t row = blockIdx.x;
  float o[kPacks][8];
  Bf16x8 z_pack[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = RowColumn(p);
    if (column >= f.width) continue;
    Load8(f.o + row * f.o_stride + column, o[p]);
    if (f.z != nullptr) {
      z_pack[p] = LoadPack(f.z + row * f.z_stride + column);
    }
  }
  const float r = RstdOf(BlockSquare(o, f.width, slots), f.width, f.eps);
  if (threadIdx.x == 0) f.rstd[row] = r;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = RowColumn(p);
    if (column >= f.width) continue;
    float weight[8];
    Load8(f.weight + column, weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) o[p][j] *= r * weight[j];
    if (f.z != nullptr) {
      float z[8];
      Unpack(z_pack[p], z);
#pragma unroll
      for (int j = 0; j < 8; ++j) o[p][j] *= FastSigmoid(z[j]);
    }
    Store8(f.y + row * f.y_stride + column, o[p]);
  }
}

struct Backward {
  const Bf16* dy;
  int64_t dy_stride;
  const Bf16* o;
  int64_t o_stride;
  const Bf16* weight;  // null: no norm
  const Bf16* z;       // null: no gate
  int64_t z_stride;
  const float* rstd;
  Bf16* dout;
  int64_t dout_stride;
  Bf16* dz;
  int64_t dz_stride;
  float* parts;  // [gridDim.x, width] or null
  int64_t rows, width;
  int64_t norm_width;  // of all ranks
  RowNumbers dots;
};

// do = dy s, dz = dy o s (1 - s), s = sigmoid(z)
__global__ void __launch_bounds__(kPackThreads) GateBackwardKernel(Backward b) {
  for (PackLoop i(b.rows, b.width / 8); i.more(); i.Next()) {
    float dy[8], o[8], z[8];
    Load8(b.dy + i.row * b.dy_stride + i.column(), dy);
    Load8(b.o + i.row * b.o_stride + i.column(), o);
    Load8(b.z + i.row * b.z_stride + i.column(), z);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float s = FastSigmoid(z[j]);
      z[j] = dy[j] * o[j] * (s * (1.0F - s));
      dy[j] *= s;
    }
    Store8(b.dz + i.row * b.dz_stride + i.column(), z);
    Store8(b.dout + i.row * b.dout_stride + i.column(), dy);
  }
}

// A block a row, one sum for each: w dn o.
__global__ void __launch_bounds__(kRowThreads) DotKernel(Backward b) {
  SharedMemory shared;
  float* slots = shared.Take<float>(kRowThreads / kWarp);
  const int64_t row = blockIdx.x;
  float dot = 0.0F;
  for (int64_t column = threadIdx.x * 8; column < b.width; column += blockDim.x * 8) {
    float dn[8], o[8], weight[8];
    Load8(b.dy + row * b.dy_stride + column, dn);
    Load8(b.o + row * b.o_stride + column, o);
    Load8(b.weight + column, weight);
    if (b.z != nullptr) {
      float z[8];
      Load8(b.z + row * b.z_stride + column, z);
#pragma unroll
      for (int j = 0; j < 8; ++j) dn[j] *= FastSigmoid(z[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) dot += weight[j] * dn[j] * o[j];
  }
  dot = BlockSum(dot, slots);
  if (threadIdx.x == 0) b.dots.mine[row] = dot;
}

// With n_i = o_i r w_i, dn = dy s and dz = dy n s (1 - s):
//   do_i = r (w_i dn_i - (o_i r) mean_j(w_j dn_j o_j r)),   dw_i = sum over rows of dn_i o_i r
// kCut: the sums of the rows over all ranks are there.
template <int kPacks, bool kCut>
__global__ void __launch_bounds__(kRowThreads) NormBackwardKernel(Backward b) {
  SharedMemory shared;
  float* slots = shared.Take<float>(kRowThreads / kWarp);
  float sums[kPacks][8] = {};
  for (int64_t row = blockIdx.x; row < b.rows; row += gridDim.x) {
    const float r = b.rstd[row];
    float dn[kPacks][8];
    Bf16x8 o_pack[kPacks];
    float dot = 0.0F;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = RowColumn(p);
      if (column >= b.width) continue;
      float o[8], weight[8];
      Load8(b.dy + row * b.dy_stride + column, dn[p]);
      o_pack[p] = LoadPack(b.o + row * b.o_stride + column);
      Unpack(o_pack[p], o);
      Load8(b.weight + column, weight);
      if (b.z != nullptr) {
        float z[8];
        Load8(b.z + row * b.z_stride + column, z);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float s = FastSigmoid(z[j]);
          z[j] = dn[p][j] * (o[j] * r * weight[j]) * (s * (1.0F - s));
          dn[p][j] *= s;
        }
        Store8(b.dz + row * b.dz_stride + column, z);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) dot += weight[j] * dn[p][j] * o[j];
    }
    dot = kCut ? b.dots.Total(row) : BlockSum(dot, slots);
    const float mean = dot * r / static_cast<float>(b.norm_width);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = RowColumn(p);
      if (column >= b.width) continue;
      float o[8], weight[8];
      // Four packs do not leave the registers to keep o: it is read again, from the L1 cache.
      if constexpr (kPacks == 2) {
        Unpack(o_pack[p], o);
      } else {
        Load8(b.o + row * b.o_stride + column, o);
      }
      Load8(b.weight + column, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sums[p][j] += dn[p][j] * (o[j] * r);
        dn[p][j] = r * (weight[j] * dn[p][j] - o[j] * r * mean);
      }
      Store8(b.dout + row * b.dout_stride + column, dn[p]);
    }
  }
  if (b.parts == nullptr) return;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = RowColumn(p);
    if (column < b.width) Store8(b.parts + blockIdx.x * b.width + column, sums[p]);
  }
}

void Check(const ConstTensor& o, const ConstTensor& weight, const ConstTensor& z,
           const ConstTensor& rstd) {
  const int64_t rows = o.dim(0);
  const int64_t width = o.dim(1);
  CheckPackedMatrix(o, rows, width);
  SALA_CHECK(o.numel() == 0 || !weight.empty() || !z.empty()) << "neither norm nor gate";
  if (!weight.empty()) {
    CheckPackedVector(weight, width);
    CheckVector(rstd, rows);
  }
  if (!z.empty()) CheckPackedMatrix(z, rows, width);
}

RowNumbers Numbers(const Op& op, const GatherBuffer& buffer, int64_t rows) {
  return {.mine = op.Data<float>(buffer.mine),
          .all = op.Data<float>(buffer.all),
          .ranks = static_cast<int>(buffer.all.dim(0)),
          .rows = rows};
}

template <bool kCut>
void LaunchBackward(const Op& op, const Backward& b, int64_t blocks) {
  op.Launch(RowPacks(b.width) == 2 ? NormBackwardKernel<2, kCut> : NormBackwardKernel<4, kCut>,
            dim3(static_cast<unsigned>(blocks)), dim3(RowThreads(b.width)),
            SharedBytes<float>(kRowThreads / kWarp), b);
}

}  // namespace

void cuda::OutputGateForward(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
                             const ConstTensor& z, float eps, const Tensor& y, const Tensor& rstd,
                             const WidthShard& shard) {
  const Op op(ctx, "OutputGateForward", o);
  Check(o, weight, z, rstd);
  CheckPackedMatrix(y, o.dim(0), o.dim(1));
  const bool norm = !weight.empty();
  Forward f = {.o = op.Data<Bf16>(o),
               .o_stride = o.stride(0),
               .weight = op.Data<Bf16>(weight),
               .z = op.Data<Bf16>(z),
               .z_stride = z.stride(0),
               .eps = eps,
               .y = op.Data<Bf16>(y),
               .y_stride = y.stride(0),
               .rstd = norm ? op.Data<float>(rstd) : nullptr,
               .rows = o.dim(0),
               .width = o.dim(1),
               .norm_width = NormWidth(shard, o.dim(1)),
               .squares = {}};
  if (!norm) {
    op.Launch(GateForwardKernel, dim3(PackBlocks(op, o.numel() / 8)), dim3(kPackThreads), 0, f);
    return;
  }
  const dim3 grid(static_cast<unsigned>(f.rows));
  const dim3 block(RowThreads(f.width));
  constexpr size_t kSlots = SharedBytes<float>(kRowThreads / kWarp);
  if (shard.exchange == nullptr) {
    op.Launch(RowPacks(f.width) == 2 ? NormForwardKernel<2> : NormForwardKernel<4>, grid, block,
              kSlots, f);
  } else if (f.rows > 0) {
    const ArenaScope scope(*ctx.scratch);
    const GatherBuffer buffer(ctx, *shard.exchange, f.rows);
    f.squares = Numbers(op, buffer, f.rows);
    op.Launch(SquareKernel, grid, block, kSlots, f);
    buffer.Gather(ctx, *shard.exchange, f.rows);
    op.Launch(CutForwardKernel, grid, block, 0, f);
  }
}

void cuda::OutputGateBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& o,
                              const ConstTensor& weight, const ConstTensor& z,
                              const ConstTensor& rstd, const Tensor& dout, const Tensor& dz,
                              const Tensor& dweight, const WidthShard& shard) {
  const Op op(ctx, "OutputGateBackward", o);
  Check(o, weight, z, rstd);
  const int64_t rows = o.dim(0);
  const int64_t width = o.dim(1);
  const bool norm = !weight.empty();
  const bool sums = !dweight.empty();
  CheckPackedMatrix(dy, rows, width);
  CheckPackedMatrix(dout, rows, width);
  if (!z.empty()) CheckPackedMatrix(dz, rows, width);
  if (sums) {
    SALA_CHECK(norm) << "dweight without a norm";
    CheckVector(dweight, width);
  }
  const ArenaScope scope(*ctx.scratch);
  const int64_t pieces = sums ? RowPieces(rows) : rows;
  const Tensor parts = sums ? ctx.scratch->New(DType::kF32, {pieces, width}) : Tensor();
  Backward b = {.dy = op.Data<Bf16>(dy),
                .dy_stride = dy.stride(0),
                .o = op.Data<Bf16>(o),
                .o_stride = o.stride(0),
                .weight = op.Data<Bf16>(weight),
                .z = op.Data<Bf16>(z),
                .z_stride = z.stride(0),
                .rstd = norm ? op.Data<float>(rstd) : nullptr,
                .dout = op.Data<Bf16>(dout),
                .dout_stride = dout.stride(0),
                .dz = op.Data<Bf16>(dz),
                .dz_stride = dz.stride(0),
                .parts = op.Data<float>(parts),
                .rows = rows,
                .width = width,
                .norm_width = NormWidth(shard, width),
                .dots = {}};
  if (!norm) {
    op.Launch(GateBackwardKernel, dim3(PackBlocks(op, o.numel() / 8)), dim3(kPackThreads), 0, b);
    return;
  }
  if (shard.exchange == nullptr) {
    LaunchBackward<false>(op, b, pieces);
  } else if (rows > 0) {
    const GatherBuffer buffer(ctx, *shard.exchange, rows);
    b.dots = Numbers(op, buffer, rows);
    op.Launch(DotKernel, dim3(static_cast<unsigned>(rows)), dim3(RowThreads(width)),
              SharedBytes<float>(kRowThreads / kWarp), b);
    buffer.Gather(ctx, *shard.exchange, rows);
    LaunchBackward<true>(op, b, pieces);
  }
  if (sums) AddColumnSums(op, b.parts, pieces, width, op.Data<float>(dweight));
}

}  // namespace sala::kernels
