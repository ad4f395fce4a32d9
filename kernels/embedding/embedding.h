// Token embedding: out[t] = scale * weight[tokens[t]].
#pragma once

#include "core/context.h"

namespace sala::kernels {

// tokens i32 [T], each in [0, V); weight f32 [V, H]; out f32 [T, H], overwritten.
void EmbeddingForward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
                      float scale, const Tensor& out);

// dweight f32 [V, H] accumulates scale * dout[t] into row tokens[t], t rising (deterministic).
void EmbeddingBackward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& dout,
                       float scale, const Tensor& dweight);

}  // namespace sala::kernels
