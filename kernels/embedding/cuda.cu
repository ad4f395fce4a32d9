// Token embedding on the GPU. The forward pass is a copy of rows, eight elements a thread and step.
// The backward pass sorts the tokens by row (group_tokens.h); then a warp takes the first token of
// each row and 256 columns, and adds the gradients of its tokens in their order: one write to each
// row of dweight, no two warps on one element. Both are bound by memory, the second by latency
// where one row has a large part of all tokens.
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"
#include "kernels/embedding/group_tokens.h"

namespace sala::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpColumns = kWarp * 8;

__global__ void __launch_bounds__(kPackThreads)
    ForwardKernel(const int32_t* tokens, TableRows table, const Bf16* weight, int64_t weight_stride,
                  float scale, Bf16* out, int64_t out_stride, int64_t count, int64_t width) {
  for (PackLoop i(count, width / 8); i.more(); i.Next()) {
    float v[8] = {};
    const int64_t row = table.RowOf(tokens[i.row]);
    if (row < table.count) Load8(weight + row * weight_stride + i.column(), v);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= scale;
    Store8(out + i.row * out_stride + i.column(), v);
  }
}

struct Backward {
  GroupedTokens tokens;
  int64_t count;
  int32_t rows;  // of dweight
  const Bf16* dout;
  int64_t dout_stride;
  float scale;
  float* dweight;
  int64_t dweight_stride;
  int64_t width;
};

// Product and sum are rounded apart, as on a CPU.
__device__ __forceinline__ void AddScaled(const Bf16x8& row, float scale, float (&sum)[8]) {
  float v[8];
  Unpack(row, v);
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] = __fadd_rn(sum[j], __fmul_rn(scale, v[j]));
}

__global__ void __launch_bounds__(kThreads) BackwardKernel(Backward b) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (at >= b.count) return;
  const int32_t id = b.tokens.rows[at];
  if (id == b.rows) return;                           // of another rank
  if (at > 0 && b.tokens.rows[at - 1] == id) return;  // not the first of its row
  const int64_t column = int64_t{blockIdx.y} * kWarpColumns + lane * 8;
  const bool inside = column < b.width;
  const Bf16* dout = b.dout + column;
  float* to = b.dweight + id * b.dweight_stride + column;
  float sum[8] = {};
  if (inside) Load8(to, sum);
  // The positions of the next 32 tokens, one a lane, as far as they have this row; theirs of dout
  // four at a time, so that four loads are under way.
  int run = kWarp;
  for (; run == kWarp; at += kWarp) {
    const int64_t next = at + lane;
    const bool same = next < b.count && b.tokens.rows[next] == id;
    const int32_t position = same ? b.tokens.positions[next] : 0;
    run = __popc(__ballot_sync(kFullMask, same));
    for (int first = 0; first < run; first += 4) {
      Bf16x8 rows[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t row = __shfl_sync(kFullMask, position, (first + k) % kWarp);
        if (inside && first + k < run) {
          rows[k] = LoadPack(dout + row * b.dout_stride);
        }
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (inside && first + k < run) AddScaled(rows[k], b.scale, sum);
      }
    }
  }
  if (inside) Store8(to, sum);
}

int64_t Check(const ConstTensor& tokens, const ConstTensor& weight, const ConstTensor& rows) {
  SALA_CHECK(tokens.rank() == 1 && weight.rank() == 2)
      << ShapeText(tokens) << ", " << ShapeText(weight);
  CheckVector(tokens, tokens.dim(0), DType::kI32);
  CheckPackedMatrix(rows, tokens.dim(0), weight.dim(1));
  return tokens.dim(0);
}

TableRows RowsFrom(int64_t first_row, int64_t rows) {
  const int64_t first = std::max<int64_t>(first_row, 0);
  SALA_CHECK(first_row >= kWholeTable && first + rows < int64_t{1} << 31)
      << "rows [" << first_row << ", " << first_row + rows << "): a GPU takes 2^31 - 1";
  return {static_cast<int32_t>(first), static_cast<int32_t>(rows)};
}

}  // namespace

void cuda::EmbeddingForward(const Context& ctx, const ConstTensor& tokens,
                            const ConstTensor& weight, float scale, const Tensor& out,
                            int64_t first_row) {
  const Op op(ctx, "EmbeddingForward", out);
  const int64_t count = Check(tokens, weight, out);
  CheckPackedMatrix(weight, weight.dim(0), weight.dim(1));
  op.Launch(ForwardKernel, dim3(PackBlocks(op, out.numel() / 8)), dim3(kPackThreads), 0,
            op.Data<int32_t>(tokens), RowsFrom(first_row, weight.dim(0)), op.Data<Bf16>(weight),
            weight.stride(0), scale, op.Data<Bf16>(out), out.stride(0), count, weight.dim(1));
}

void cuda::EmbeddingBackward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& dout,
                             float scale, const Tensor& dweight, int64_t first_row) {
  const Op op(ctx, "EmbeddingBackward", dout);
  const int64_t count = Check(tokens, dweight, dout);
  CheckShape(dweight, {dweight.dim(0), dweight.dim(1)});
  SALA_CHECK(dweight.stride(0) % 4 == 0 && Aligned16(dweight.raw()))
      << "found " << ShapeText(dweight) << " with row stride " << dweight.stride(0)
      << ", expected a row stride and an address that are multiples of 4 elements";
  if (count == 0) return;
  const ArenaScope scope(*ctx.scratch);
  const TableRows table = RowsFrom(first_row, dweight.dim(0));
  const Backward b = {.tokens = GroupTokens(ctx, op, op.Data<int32_t>(tokens), count, table),
                      .count = count,
                      .rows = table.count,
                      .dout = op.Data<Bf16>(dout),
                      .dout_stride = dout.stride(0),
                      .scale = scale,
                      .dweight = op.Data<float>(dweight),
                      .dweight_stride = dweight.stride(0),
                      .width = dweight.dim(1)};
  op.Launch(BackwardKernel,
            dim3(static_cast<unsigned>(CeilDiv(count, kWarps)),
                 static_cast<unsigned>(CeilDiv(b.width, kWarpColumns))),
            dim3(kThreads), 0, b);
}

}  // namespace sala::kernels
