// Squared error between a student's and a teacher's hidden states (HALO alignment,
// docs/math/halo.md 2).
//
// On a GPU y, target and dy are bf16, and H and row strides are multiples of 8. Sums are taken in
// float64 by a tree that depends on the shape only; the result is waited for.
#pragma once

#include "core/context.h"

namespace sala::kernels {

struct MseResult {
  double squared_error = 0;  // sum over all elements of (y - target)^2
  double target_sum = 0;     // sum of target, and ...
  double target_square = 0;  // ... of target^2: for the variance of the target
  int64_t elements = 0;
};

// y, target f32 [T, H]; dy f32 [T, H] = 2 grad_scale (y - target), overwritten, may be empty.
MseResult MeanSquaredError(const Context& ctx, const ConstTensor& y, const ConstTensor& target,
                           float grad_scale, const Tensor& dy);

}  // namespace sala::kernels
