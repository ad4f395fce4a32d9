// RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), over the last axis; plain
// weight (no "1 + w").
//
// On a GPU x, y, weight and their kin (dy, dx, residual, branch, sum) are bf16; rstd and dweight
// stay f32. H is a multiple of 8 up to 16384, row strides are multiples of 8. Sums over a row are
// taken in float32 by a fixed tree; the norm and its gradient are those of the stored, rounded x.
// The backward pass takes min(ceil(T / 16), 512) H floats of scratch when dweight is given, and
// sums in an order that depends on T and H only.
#pragma once

#include "core/context.h"
#include "kernels/common/documents.h"

namespace sala::kernels {

// x f32 [T, H], weight f32 [H] -> y f32 [T, H], rstd f32 [T]; both overwritten. The mean is summed
// in float64.
void RmsNormForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight, float eps,
                    const Tensor& y, const Tensor& rstd);

// sum = residual + branch_scale * branch (sum may be the same memory as residual), then y =
// RMSNorm(sum), sum as stored.
void RmsNormResidualForward(const Context& ctx, const ConstTensor& residual,
                            const ConstTensor& branch, float branch_scale,
                            const ConstTensor& weight, float eps, const Tensor& sum,
                            const Tensor& y, const Tensor& rstd);

// dx (overwritten or accumulated as `write` says; the residual stream accumulates), dweight [H]
// accumulates. dweight may be empty (frozen).
void RmsNormBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                     const ConstTensor& weight, const ConstTensor& rstd, const Tensor& dx,
                     Write write, const Tensor& dweight);

}  // namespace sala::kernels
