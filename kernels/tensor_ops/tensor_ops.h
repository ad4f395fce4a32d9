// Copies, sums and changes of number type of whole tensors.
#pragma once

#include "core/context.h"

namespace sala::kernels {

// to = from, rounded to the number type of `to` (float32 and bfloat16, nearest even). Contiguous,
// same number of elements, same device. The same type: a copy. On a CPU float32 to float32 only.
void Cast(const Context& ctx, const ConstTensor& from, const Tensor& to);

// to = from, matrices of the same shape and number type (float32 or bfloat16) whose rows may be
// strided. On a GPU rows begin at multiples of 16 bytes and are that long.
void CopyColumns(const Context& ctx, const ConstTensor& from, const Tensor& to);

// sum += term, contiguous, both of the context's activation type (computed in float32, rounded
// once) or both float32.
void Add(const Context& ctx, const ConstTensor& term, const Tensor& sum);

}  // namespace sala::kernels
