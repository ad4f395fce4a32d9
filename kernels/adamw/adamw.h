// AdamW on flat buffers (decoupled weight decay, Loshchilov and Hutter, arXiv 1711.05101).
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  p -= lr * ( (m / (1 - b1^step)) / (sqrt(v /
//   (1 - b2^step)) + eps) + wd p )
// with g = grad_scale * grad (the clip factor).
#pragma once

#include <cstdint>

#include "core/context.h"

namespace sala::kernels {

struct AdamWOptions {
  double learning_rate = 0;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0;
  int64_t step = 1;  // 1 at the first update
  double grad_scale = 1;
};

// All f32 [n]; param, exp_avg, exp_avg_sq updated in place. `rounded` bf16 [n], GPU only, may be
// empty: overwritten with the new param rounded to bfloat16, what the model computes with. On a GPU
// the buffers may begin anywhere; 16-byte boundaries are faster. Both forms round every operation
// by itself, in one order: the same numbers give the same bits.
void AdamWStep(const Context& ctx, const Tensor& param, const ConstTensor& grad,
               const Tensor& exp_avg, const Tensor& exp_avg_sq, const AdamWOptions& options,
               const Tensor& rounded = {});

}  // namespace sala::kernels
