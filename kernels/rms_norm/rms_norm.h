// RMSNorm: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), over the last axis; plain
// weight (no "1 + w").
#pragma once

#include "core/context.h"
#include "kernels/common/documents.h"

namespace sala::kernels {

// x f32 [T, H], weight f32 [H] -> y f32 [T, H], rstd f32 [T]; both overwritten. The mean is summed
// in float64.
void RmsNormForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight, float eps,
                    const Tensor& y, const Tensor& rstd);

// sum = residual + branch_scale * branch (sum may be the same memory as residual), then y =
// RMSNorm(sum).
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
