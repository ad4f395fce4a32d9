// Per-head RMSNorm of queries or keys followed by the rotary embedding ("rotate half": channel i
// pairs with i + D/2). Either part may be left out: an empty weight means no norm, empty cos/sin
// mean no rotation.
//
// On a GPU x, y, weight, dy and dx are bf16; cos, sin, rstd and dweight stay f32. D is 16, 32, 64
// or 128; strides of tokens and heads are multiples of 8. The normed value is not rounded before
// the rotation. The backward pass takes min(ceil(T / 8), 1024) D floats of scratch when dweight is
// given, and sums in an order that depends on the shape only.
#pragma once

#include "core/context.h"

namespace sala::kernels {

// positions i32 [T] -> cos, sin f32 [T, D/2]: angle = float32(position) * float32(theta^(-2i/D)),
// product rounded to float32 (docs/math/token_wise.md), cos and sin of that float32 angle rounded
// once.
void RopeTable(const Context& ctx, const ConstTensor& positions, int64_t head_dim, float theta,
               const Tensor& cos, const Tensor& sin);

// x f32 [T, N, D] (any token stride), weight f32 [D] shared by the heads -> y f32 [T, N, D], rstd
// f32 [T, N]. Norm first, rotation second. y may not overlap x. rstd is ignored when weight is
// empty.
void QkNormRopeForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight,
                       float eps, const ConstTensor& cos, const ConstTensor& sin, const Tensor& y,
                       const Tensor& rstd);

// dx overwritten; dweight [D] accumulates (may be empty: frozen, or no norm).
void QkNormRopeBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                        const ConstTensor& weight, const ConstTensor& rstd, const ConstTensor& cos,
                        const ConstTensor& sin, const Tensor& dx, const Tensor& dweight);

}  // namespace sala::kernels
