// Token embedding: out[t] = scale * weight[tokens[t]].
//
// On a GPU weight, out and dout are bf16 (dweight stays f32), H and row strides are multiples of 8,
// and nothing looks at the tokens: one outside of [0, V) reads or writes foreign memory, so they
// must have been checked on the host. The backward pass groups the tokens by a stable radix sort in
// scratch (4 T + 256 (ceil(T / 2048) + 1) integers).
#pragma once

#include "core/context.h"

namespace sala::kernels {

// tokens i32 [T], each in [0, V); weight f32 [V, H]; out f32 [T, H], overwritten.
void EmbeddingForward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
                      float scale, const Tensor& out);

// dweight f32 [V, H] accumulates scale * dout[t] into row tokens[t], t rising (deterministic; the
// same bits as on a CPU for the same numbers).
void EmbeddingBackward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& dout,
                       float scale, const Tensor& dweight);

}  // namespace sala::kernels
