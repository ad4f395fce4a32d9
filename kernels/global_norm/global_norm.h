// Sum of squares for the global gradient norm.
#pragma once

#include "core/context.h"

namespace sala::kernels {

// x f32, contiguous, any shape. Summed in float64 in pieces of fixed size added in order: same bits
// for any thread count and for any GPU (CPU and GPU cut and add differently). On a GPU it waits for
// the result. Not-a-number and infinity pass through.
double SumOfSquares(const Context& ctx, const ConstTensor& x);

}  // namespace sala::kernels
