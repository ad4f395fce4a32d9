// SwiGLU on the GPU: memory bound, eight elements a thread and step, one pass each way.
#include "kernels/common/cuda_math.h"
#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float SigmoidOf(float x) { return 1.0F / (1.0F + __expf(-x)); }

// Rows of `width` elements, a multiple of 8, whose strides are multiples of 8.
struct Rows {
  int64_t count, width;
  int64_t gate_stride, up_stride, y_stride;
};

__global__ void __launch_bounds__(kThreads)
    SwiGluForwardKernel(const Bf16* gate, const Bf16* up, Bf16* y, Rows rows) {
  const int64_t packs = rows.width / 8;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows.count * packs;
       i += step) {
    const int64_t row = i / packs;
    const int64_t column = i % packs * 8;
    float g[8], u[8];
    Load8(gate + row * rows.gate_stride + column, g);
    Load8(up + row * rows.up_stride + column, u);
#pragma unroll
    for (int j = 0; j < 8; ++j) g[j] = g[j] * SigmoidOf(g[j]) * u[j];
    Store8(y + row * rows.y_stride + column, g);
  }
}

// dgate and dup may be the memory of gate and up: a thread reads its elements before it writes
// them.
__global__ void __launch_bounds__(kThreads)
    SwiGluBackwardKernel(const Bf16* dy, const Bf16* gate, const Bf16* up, Bf16* dgate, Bf16* dup,
                         Rows rows, int64_t dgate_stride, int64_t dup_stride) {
  const int64_t packs = rows.width / 8;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < rows.count * packs;
       i += step) {
    const int64_t row = i / packs;
    const int64_t column = i % packs * 8;
    float g[8], u[8], d[8];
    Load8(gate + row * rows.gate_stride + column, g);
    Load8(up + row * rows.up_stride + column, u);
    Load8(dy + row * rows.y_stride + column, d);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float s = SigmoidOf(g[j]);
      const float silu = g[j] * s;
      const float grad = d[j];
      d[j] = grad * u[j] * s * (1.0F + g[j] * (1.0F - s));
      u[j] = grad * silu;
    }
    Store8(dgate + row * dgate_stride + column, d);
    Store8(dup + row * dup_stride + column, u);
  }
}

// Enough blocks to fill the device a few times over; the loop inside the kernel does the rest.
unsigned Blocks(const Op& op, int64_t packs) {
  const int64_t most = int64_t{op.device().info().multiprocessors} * 16;
  return static_cast<unsigned>(std::min(CeilDiv(packs, kThreads), most));
}

void CheckPacks(const ConstTensor& x) {
  SALA_CHECK(x.dim(1) % 8 == 0 && x.stride(0) % 8 == 0)
      << ShapeText(x) << ": rows must be multiples of 8 elements on a GPU";
}

}  // namespace

void cuda::SwiGluForward(const Context& ctx, const ConstTensor& gate, const ConstTensor& up,
                         const Tensor& y) {
  const Op op(ctx, "SwiGluForward", gate);
  for (const ConstTensor& x : {gate, up, ConstTensor(y)}) CheckPacks(x);
  const Rows rows = {gate.dim(0), gate.dim(1), gate.stride(0), up.stride(0), y.stride(0)};
  op.Launch(SwiGluForwardKernel, dim3(Blocks(op, gate.numel() / 8)), dim3(kThreads), 0,
            op.Data<Bf16>(gate), op.Data<Bf16>(up), op.Data<Bf16>(y), rows);
}

void cuda::SwiGluBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& gate,
                          const ConstTensor& up, const Tensor& dgate, const Tensor& dup) {
  const Op op(ctx, "SwiGluBackward", gate);
  for (const ConstTensor& x : {dy, gate, up, ConstTensor(dgate), ConstTensor(dup)}) CheckPacks(x);
  const Rows rows = {gate.dim(0), gate.dim(1), gate.stride(0), up.stride(0), dy.stride(0)};
  op.Launch(SwiGluBackwardKernel, dim3(Blocks(op, gate.numel() / 8)), dim3(kThreads), 0,
            op.Data<Bf16>(dy), op.Data<Bf16>(gate), op.Data<Bf16>(up), op.Data<Bf16>(dgate),
            op.Data<Bf16>(dup), rows, dgate.stride(0), dup.stride(0));
}

}  // namespace sala::kernels
