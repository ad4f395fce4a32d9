// HyPE's position-dependent scale of the queries of softmax layers: q_t <- s_t q_t, s_t = log(t +
// a) / log(a), t the position in the document (docs/math/halo.md 7; arXiv 2601.22156). Used at
// inference only.
#pragma once

#include "core/context.h"

namespace sala::kernels {

// q f32 [T, N, D] scaled in place; positions i32 [T]; a > 1.
void LogitScaleForward(const Context& ctx, const ConstTensor& positions, double a, const Tensor& q);

}  // namespace sala::kernels
