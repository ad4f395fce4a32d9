// Lightning attention: linear attention with one constant decay per head, lambda_h = exp(-slope_h).
//   S_h[t] = lambda_h S_h[t-1] + k_h[t] v_h[t]^T        o_h[t] = scale S_h[t]^T q_h[t]        S = 0
//   at a document's start
// Chunked form with only non-negative powers of lambda (never lambda^-j); state in float32.
//
// Chunks lie on one grid over all tokens, so a document's bits may depend on its offset and on the
// number of tokens, but never on the values of other documents. One call, and two calls that carry
// the state over, agree to rounding. Without tokens what enters leaves: state_out = state_in,
// dstate_in = dstate_out.
//
// On a GPU the activations q, k, v, out and their gradients read bf16 below (states stay f32), D is
// 16, 32, 64 or 128, token strides are multiples of 8, slopes are not negative, no output may be
// the memory of an input but for state_out = state_in and dstate_in = dstate_out, and products of
// more than two factors round one of them to bf16 on the way: a score, a decayed v (k, q, dO), a
// state. Work space there: 2 bytes a token, a state per head and segment (256 to 4096 tokens each),
// twice that backward. Results are the same to the bit in every run and on every card.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/context.h"

namespace sala::kernels {

// The decay slopes of n heads: 2^(-8 (h+1) / n) for a power of two; otherwise those of the largest
// power of two p below n, then every second slope of 2p heads (the ALiBi rule). Source:
// docs/math/lightning.md.
std::vector<float> LightningSlopes(int64_t n);

// q, k, v f32 [T, N, D] (any token stride), cu_seqlens [S + 1], slopes [N].
// state_in f32 [N, D, D] (key x value) enters the first document, which then counts as begun before
// token 0; empty: zero. out f32 [T, N, D]; state_out f32 [N, D, D], the state after the last token,
// may be empty. All overwritten.
void LightningForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                      const ConstTensor& v, std::span<const int32_t> cu_seqlens,
                      std::span<const float> slopes, float scale, const ConstTensor& state_in,
                      const Tensor& out, const Tensor& state_out);

// dstate_out [N, D, D]: gradient of the state that leaves the last token; empty: zero. dq, dk, dv,
// and dstate_in (may be empty) are overwritten. The states are recomputed; forward saves nothing.
// A state_in or a dstate_in says that the first document began before token 0; a state_in of zeros
// is as good as another.
void LightningBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                       const ConstTensor& v, const ConstTensor& dout,
                       std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                       float scale, const ConstTensor& state_in, const ConstTensor& dstate_out,
                       const Tensor& dq, const Tensor& dk, const Tensor& dv,
                       const Tensor& dstate_in);

// The state after the last token only, the bits of LightningForward's state_out: whoever has the
// tokens behind needs it before any output.
void LightningStates(const Context& ctx, const ConstTensor& k, const ConstTensor& v,
                     std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                     const ConstTensor& state_in, const Tensor& state_out);

// The gradient of the state that enters token 0 only, the bits of LightningBackward's dstate_in.
// carried_in: the first document began before token 0; otherwise the result is zero where there are
// tokens.
void LightningStateGradient(const Context& ctx, const ConstTensor& q, const ConstTensor& dout,
                            std::span<const int32_t> cu_seqlens, std::span<const float> slopes,
                            float scale, bool carried_in, const ConstTensor& dstate_out,
                            const Tensor& dstate_in);

// One new token (generation): q, k, v [N, D], out [N, D] overwritten, state [N, D, D] carried on to
// the new token.
void LightningDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                     const ConstTensor& v, std::span<const float> slopes, float scale,
                     const Tensor& state, const Tensor& out);

}  // namespace sala::kernels
