// SwiGLU: y = silu(gate) * up, silu(x) = x * sigmoid(x).
//
// On a GPU f32 reads bf16 below, and widths and row strides are multiples of 8.
#pragma once

#include "core/context.h"

namespace sala::kernels {

// gate, up, y f32 [T, F]; rows may be strided. y overwritten.
void SwiGluForward(const Context& ctx, const ConstTensor& gate, const ConstTensor& up,
                   const Tensor& y);

// dgate, dup overwritten; they may be the same memory as gate and up.
void SwiGluBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& gate,
                    const ConstTensor& up, const Tensor& dgate, const Tensor& dup);

}  // namespace sala::kernels
