// What follows a mixer before its output projection: an optional RMSNorm over the whole width, then
// an optional gate.
//   y = norm(o) * sigmoid(z)
// Softmax layers use the gate alone (weight empty), linear layers both. At least one must be
// present.
//
// On a GPU o, z, y, weight and their gradients are bf16, except for dweight, which like rstd stays
// f32. W is a multiple of 8, with a norm up to 16384; row strides are multiples of 8. Sums over a
// row are taken in float32 by a fixed tree. The backward pass takes min(ceil(T / 16), 512) W floats
// of scratch when dweight is given, and sums in an order that depends on T and W only.
#pragma once

#include "core/context.h"

namespace sala::kernels {

// o, z f32 [T, W]; weight f32 [W] or empty (no norm); z empty: no gate -> y f32 [T, W], rstd f32
// [T] (unused without norm).
void OutputGateForward(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
                       const ConstTensor& z, float eps, const Tensor& y, const Tensor& rstd);

// dout (of o) and dz overwritten (dz may be empty only if z is); dweight accumulates, may be empty.
void OutputGateBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& o,
                        const ConstTensor& weight, const ConstTensor& z, const ConstTensor& rstd,
                        const Tensor& dout, const Tensor& dz, const Tensor& dweight);

}  // namespace sala::kernels
