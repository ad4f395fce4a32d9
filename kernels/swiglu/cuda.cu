// SwiGLU on the GPU: memory bound, eight elements a thread and step, one pass each way.
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

// Rows of `width` elements, a multiple of 8, whose strides are multiples of 8.
struct Rows {
  int64_t count, width;
  int64_t gate_stride, up_stride, y_stride;
};

__global__ void __launch_bounds__(kPackThreads)
    SwiGluForwardKernel(const Bf16* gate, const Bf16* up, Bf16* y, Rows rows) {
  for (PackLoop i(rows.count, rows.width / 8); i.more(); i.Next()) {
    float g[8], u[8];
    Load8(gate + i.row * rows.gate_stride + i.column(), g);
    Load8(up + i.row * rows.up_stride + i.column(), u);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = g[j] * FastSigmoid(g[j]) * u[j];
    Store8(y + i.row * rows.y_stride + i.column(), g);
  }
}

// dgate and dup may be the memory of gate and up: a thread reads its elements before it writes
// them.
__global__ void __launch_bounds__(kPackThreads)
    SwiGluBackwardKernel(const Bf16* dy, const Bf16* gate, const Bf16* up, Bf16* dgate, Bf16* dup,
                         Rows rows, int64_t dgate_stride, int64_t dup_stride) {
  for (PackLoop i(rows.count, rows.width / 8); i.more(); i.Next()) {
    float g[8], u[8], d[8];
    Load8(gate + i.row * rows.gate_stride + i.column(), g);
    Load8(up + i.row * rows.up_stride + i.column(), u);
    Load8(dy + i.row * rows.y_stride + i.column(), d);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float s = FastSigmoid(g[j]);
      const float silu = g[j] * s;
      const float grad = d[j];
      d[j] = grad * u[j] * s * (1.0F + g[j] * (1.0F - s));
      u[j] = grad * silu;
    }
    Store8(dgate + i.row * dgate_stride + i.column(), d);
    Store8(dup + i.row * dup_stride + i.column(), u);
  }
}

}  // namespace

void cuda::SwiGluForward(const Context& ctx, const ConstTensor& gate, const ConstTensor& up,
                         const Tensor& y) {
  const Op op(ctx, "SwiGluForward", gate);
  for (const ConstTensor& x : {gate, up, ConstTensor(y)}) {
    CheckPackedMatrix(x, gate.dim(0), gate.dim(1));
  }
  const Rows rows = {gate.dim(0), gate.dim(1), gate.stride(0), up.stride(0), y.stride(0)};
  op.Launch(SwiGluForwardKernel, dim3(PackBlocks(op, gate.numel() / 8)), dim3(kPackThreads), 0,
            op.Data<Bf16>(gate), op.Data<Bf16>(up), op.Data<Bf16>(y), rows);
}

void cuda::SwiGluBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& gate,
                          const ConstTensor& up, const Tensor& dgate, const Tensor& dup) {
  const Op op(ctx, "SwiGluBackward", gate);
  for (const ConstTensor& x : {dy, gate, up, ConstTensor(dgate), ConstTensor(dup)}) {
    CheckPackedMatrix(x, gate.dim(0), gate.dim(1));
  }
  const Rows rows = {gate.dim(0), gate.dim(1), gate.stride(0), up.stride(0), dy.stride(0)};
  op.Launch(SwiGluBackwardKernel, dim3(PackBlocks(op, gate.numel() / 8)), dim3(kPackThreads), 0,
            op.Data<Bf16>(dy), op.Data<Bf16>(gate), op.Data<Bf16>(up), op.Data<Bf16>(dgate),
            op.Data<Bf16>(dup), rows, dgate.stride(0), dup.stride(0));
}

}  // namespace sala::kernels
