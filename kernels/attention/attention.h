// Dense causal softmax attention over packed documents, grouped-query: query head h reads key/value
// head h / (N / K).
//   o_h[t] = sum_{j <= t, same document} softmax_j(scale q_h[t] . k_g[j]) v_g[j]
//
// The queries may be a range of the tokens (context parallelism): k, v and their gradients have the
// T tokens of `documents`; q, out, lse, dout and dq have Tq rows, row i being token first_query +
// i, first_query + Tq <= T. Forward rows and dq do not depend on how the tokens are cut in ranges,
// to the bit; dk and dv are sums over the given queries, so those of ranges add up to those of all
// tokens but for rounding. Tq = T and first_query = 0 are all tokens; Tq = 0 and no documents are
// legal.
//
// On a GPU f32 reads bf16 below, except for lse; D is 16, 32, 64 or 128 and token strides are
// multiples of 8. P and dS are rounded to bf16 where they enter a product, sums are float32.
// Results repeat bit for bit, and those of a document do not depend on what else is packed.
#pragma once

#include <span>

#include "core/context.h"
#include "kernels/common/documents.h"

namespace sala::kernels {

// q f32 [Tq, N, D], k and v f32 [T, K, D] (any token stride, N a multiple of K) -> out f32 [Tq, N,
// D], lse f32 [Tq, N] (natural log of the sum of exp(scale q.k)). Only tokens inside `documents`
// are read and written.
void AttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                      const ConstTensor& v, std::span<const DocumentRange> documents, float scale,
                      const Tensor& out, const Tensor& lse, int64_t first_query = 0);

// dq, dk, dv overwritten for the tokens of `documents`; dk and dv are zero where no query attends.
// On a GPU dk and dv are either bf16 or, for sums that are to be added, f32. Scratch on a GPU: Tq *
// N floats, and for documents of more than 32768 / (N / K) queries 512 * D bytes for each 64 keys
// and each such number of later queries (sums of dk and dv that are joined at the end).
void AttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                       const ConstTensor& v, const ConstTensor& out, const ConstTensor& lse,
                       const ConstTensor& dout, std::span<const DocumentRange> documents,
                       float scale, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                       int64_t first_query = 0);

// One new token (generation): q [N, D], keys and values of all n tokens so far including the new
// one, [n, K, D].
void AttentionDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                     const ConstTensor& v, float scale, const Tensor& out);

}  // namespace sala::kernels
