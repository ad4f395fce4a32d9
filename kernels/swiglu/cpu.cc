#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"
#include "kernels/swiglu/swiglu.h"

namespace sala::kernels {
namespace {

SALA_INLINE void ForwardRowBody(int64_t n, const float* gate, const float* up, float* y) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = gate[i] * Sigmoid(gate[i]) * up[i];
}
constexpr Vectorized<ForwardRowBody> ForwardRow{};

SALA_INLINE void BackwardRowBody(int64_t n, const float* dy, const float* gate, const float* up,
                                 float* dgate, float* dup) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i];
    const float u = up[i];
    const float s = Sigmoid(g);
    dgate[i] = dy[i] * u * (s * (1.0F + g * (1.0F - s)));
    dup[i] = dy[i] * (g * s);
  }
}
constexpr Vectorized<BackwardRowBody> BackwardRow{};

void Check(const Context& ctx, const ConstTensor& gate, const ConstTensor& other) {
  CheckCpu(ctx);
  SALA_CHECK(gate.rank() == 2) << ShapeText(gate);
  CheckShape(gate, {gate.dim(0), gate.dim(1)});
  CheckShape(other, {gate.dim(0), gate.dim(1)});
}

}  // namespace

void SwiGluForward(const Context& ctx, const ConstTensor& gate, const ConstTensor& up,
                   const Tensor& y) {
  if (ctx.cuda()) return Cuda(ctx).SwiGluForward(ctx, gate, up, y);
  Check(ctx, gate, up);
  Check(ctx, gate, y);
  ctx.pool->For(gate.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      ForwardRow(gate.dim(1), gate.Row<float>(t), up.Row<float>(t), y.Row<float>(t));
    }
  });
}

void SwiGluBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& gate,
                    const ConstTensor& up, const Tensor& dgate, const Tensor& dup) {
  if (ctx.cuda()) return Cuda(ctx).SwiGluBackward(ctx, dy, gate, up, dgate, dup);
  for (const ConstTensor& other : {dy, up, ConstTensor(dgate), ConstTensor(dup)}) {
    Check(ctx, gate, other);
  }
  ctx.pool->For(gate.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      BackwardRow(gate.dim(1), dy.Row<float>(t), gate.Row<float>(t), up.Row<float>(t),
                  dgate.Row<float>(t), dup.Row<float>(t));
    }
  });
}

}  // namespace sala::kernels
