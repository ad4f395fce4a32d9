// Distillation loss KL(teacher || student) on logits, fused with both output heads, in chunks of
// tokens.
//   loss_sum = sum_t tau^2 sum_v p_T (log p_T - log p_S),  p = softmax(logits / tau),  every token
//   counts gradient on the student's logits: tau (p_S - p_T)   (docs/math/halo.md 6)
//
// On a GPU hidden states, weights and dhidden are bf16, logits stay f32 and the gradient of the
// student's, an operand of two products, is bf16; widths and row strides are multiples of 8, V is
// free up to 2^30 (products whose rows are not whole multiples of 8 long are slower). Scratch:
// 2 * chunk_tokens * V * 4 bytes, 24 bytes a token, and that of a product (gemm.h). The same inputs
// give the same bits; chunk_tokens may change the last ones.
//
// Cut over ranks (KlDivergenceOptions::shard): both heads are cut alike, each rank has its rows and
// gets the result of the whole vocabulary, with the same bits; dhidden is its part of the gradient
// (the sum over ranks is the gradient, the caller adds), dweight its rows. Exchanged: for each
// chunk, so ceil(T / min(chunk_tokens, T)) times, first kKlSoftmaxFloats = 8 float32 for each of
// its tokens (maximum, sum and arg-max of both heads), then kKlPartFloats = 4 (sums that need the
// maxima of the whole row): T * 48 bytes from each rank in all. Scratch besides: chunk_tokens * 48
// * (ranks + 1) bytes.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "kernels/common/vocabulary_shard.h"

namespace sala::kernels {

struct KlDivergenceResult {
  double loss_sum = 0;         // nats, times tau^2
  double teacher_entropy = 0;  // sum over tokens of the entropy of p_T at the temperature used
  int64_t agree = 0;           // tokens where both arg-maxes (lowest id on ties) are equal
  int64_t tokens = 0;
};

struct KlDivergenceOptions {
  float teacher_logit_scale = 1.0F;
  float student_logit_scale = 1.0F;
  float temperature = 1.0F;
  float grad_scale = 1.0F;  // gradient of grad_scale * loss_sum
  int64_t chunk_tokens = 512;
  VocabularyShard shard = {};  // of both heads
};

// Floats a token that a rank sends, in the two exchanges of a chunk.
constexpr int64_t kKlSoftmaxFloats = 2 * kSoftmaxFields;  // the teacher's share, the student's
constexpr int64_t kKlPartFloats = 2 * 2;  // difference and energy, each a float64 in two floats

// teacher_hidden f32 [T, Ht], teacher_weight f32 [V, Ht], student_hidden f32 [T, H], student_weight
// f32 [V, H]. dhidden f32 [T, H] overwritten, dweight f32 [V, H] accumulated; each may be empty. T
// may be 0. Rows of dweight that are padding stay as they are.
KlDivergenceResult KlDivergence(const Context& ctx, const ConstTensor& teacher_hidden,
                                const ConstTensor& teacher_weight,
                                const ConstTensor& student_hidden,
                                const ConstTensor& student_weight,
                                const KlDivergenceOptions& options, const Tensor& dhidden,
                                const Tensor& dweight);

}  // namespace sala::kernels
