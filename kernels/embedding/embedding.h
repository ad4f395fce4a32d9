// Token embedding: out[t] = scale * weight[tokens[t]].
//
// Cut over ranks, weight holds rows [first_row, first_row + V) of the table: a token outside of
// them gets a row of zeros and is passed over in the backward pass. The sum of out over the ranks
// is then the embedding, and each rank's dweight the gradient of its rows.
//
// On a GPU weight, out and dout are bf16 (dweight stays f32), H and row strides are multiples of 8,
// and a token outside of the whole table is treated as one of another rank: nothing says so, so
// tokens must have been checked on the host. The backward pass groups the tokens by a stable radix
// sort in scratch (4 T + 256 (ceil(T / 2048) + 1) integers).
#pragma once

#include "core/context.h"

namespace sala::kernels {

// first_row of a table that is not cut: on a CPU a token outside of it ends the program.
constexpr int64_t kWholeTable = -1;

// tokens i32 [T], each in [0, V) of a whole table, not negative in a part of one; weight f32 [V,
// H]; out f32 [T, H], overwritten.
void EmbeddingForward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
                      float scale, const Tensor& out, int64_t first_row = kWholeTable);

// dweight f32 [V, H] accumulates scale * dout[t] into the row of tokens[t], t rising
// (deterministic; the same bits as on a CPU for the same numbers).
void EmbeddingBackward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& dout,
                       float scale, const Tensor& dweight, int64_t first_row = kWholeTable);

}  // namespace sala::kernels
