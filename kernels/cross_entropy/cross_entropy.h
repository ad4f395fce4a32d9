// Next-token cross entropy fused with the output head, in chunks of tokens: logits = logit_scale *
// hidden W^T exist for `chunk_tokens` rows at a time, in scratch, never for all tokens.
// The caller waits for the result.
//
// On a GPU hidden, weight and dhidden are bf16, logits stay f32 and their gradient, an operand of
// two products, is bf16; H and row strides are multiples of 8, V is free up to 2^30 (products whose
// rows are not whole multiples of 8 long are slower). Scratch: chunk_tokens * V * 4 bytes, 32 bytes
// a token, and that of a product (gemm.h). The same inputs give the same bits; chunk_tokens may
// change the last ones. A label out of range ends the program at the end of the call.
//
// Cut over ranks (CrossEntropyOptions::shard): each rank has its rows of the weight and gets the
// result and token_loss of the whole vocabulary, with the same bits; dhidden is its part of the
// gradient (the sum over ranks is the gradient, the caller adds), dweight its rows. Labels are
// those of the whole vocabulary. Exchanged: for each chunk, so ceil(T / min(chunk_tokens, T))
// times, kCrossEntropyShardFloats = 5 float32 for each of its tokens, targets or not: T * 20 bytes
// from each rank in all. Scratch besides: chunk_tokens * 20 * (ranks + 1) bytes.
#pragma once

#include <cstdint>

#include "core/context.h"
#include "kernels/common/vocabulary_shard.h"

namespace sala::kernels {

struct CrossEntropyResult {
  double loss_sum = 0;  // sum over targets, nats
  int64_t targets = 0;  // labels >= 0
  int64_t correct = 0;  // targets where the arg-max (lowest id on ties) is the label
};

struct CrossEntropyOptions {
  float logit_scale = 1.0F;
  float grad_scale =
      1.0F;  // gradient of grad_scale * loss_sum; 1 / targets of the global batch in training
  int64_t chunk_tokens = 512;
  VocabularyShard shard = {};
};

// Floats a token that a rank sends: its share of the softmax, and the label's logit (0 where
// another rank has it).
constexpr int64_t kCrossEntropyShardFloats = kSoftmaxFields + 1;

// hidden f32 [T, H], weight f32 [V, H], labels i32 [T] (-1: not a target).
// token_loss f32 [T] (0 where there is no target), dhidden f32 [T, H] overwritten, dweight f32 [V,
// H] accumulated: each may be empty. Sums in float64, tokens in order. T may be 0. Rows of dweight
// that are padding stay as they are.
CrossEntropyResult CrossEntropy(const Context& ctx, const ConstTensor& hidden,
                                const ConstTensor& weight, const ConstTensor& labels,
                                const CrossEntropyOptions& options, const Tensor& token_loss,
                                const Tensor& dhidden, const Tensor& dweight);

}  // namespace sala::kernels
