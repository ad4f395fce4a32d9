// The whole model in float64, forward and backward, in plain loops: what the fast path is measured
// against. It is built from the kernels' references and shares no code with the kernels, but for
// tables and rules (decay slopes, rotary angles). One thread, parameters and what the backward pass
// needs in float64: for small models and short batches.
//
//   ReferenceResult r = ReferenceCrossEntropy(config, store, batch, options, 1.0);
//   r.gradients[spec.offset + i]          // of element i of a tensor of store.specs()
//
// Every store is a whole, uncut float32 one (ParameterSpecs(config)). Exceptions to float64: the
// angle of the rotary embedding is a float32 product (kernels/qk_norm_rope/frequencies.h), and
// decay slopes are float32 numbers.
//
// Sparse attention: blocks are chosen in float64 from the forward pass's queries and keys and get
// no gradient. Choices are discrete: where `selection_margin` is below twice the relative error of
// a block score, another arithmetic may choose another block, and all that follows differs. In
// float32 a score's relative error is that of an exponential: 2^-24 times the size of q.k plus a
// few units.
//
// RunOptions::recompute means nothing here; logit_scale_base counts.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "model/loss.h"
#include "model/model.h"

namespace sala::model {

// kPublishedRounding keeps tensors as the published model code does, which stores bfloat16. It is
// for comparisons with that code and its ports, forward only. Rounded to bfloat16, after float32:
//   the parameters; the scaled embedding; in a norm the normed value, then its product with the
//   weight; the output of every linear map; queries and keys after norm and after rotation; the
//   output of either attention; o_norm as a norm; the gate's sigmoid and its product; silu(gate),
//   its product with up; a branch times the residual factor, then the sum; compressed keys; the
//   block scores summed over heads; the hidden states divided for the head; the logits.
// Everything between two of these points is float64 where the published code has float32, or bf16
// products summed in float32, and its attention kernels round probabilities to bfloat16 on the way.
// So results agree to a bfloat16 rounding here and there, not to the bit.
enum class ReferenceArithmetic : uint8_t { kFloat64, kPublishedRounding };

struct ReferenceResult {
  double loss_sum = 0;  // nats
  int64_t count = 0;    // what the loss is summed over
  double selection_margin = std::numeric_limits<double>::infinity();
  std::vector<double> hidden;     // [T, H] after the final norm
  std::vector<double> logits;     // [T, V]
  std::vector<double> gradients;  // laid out as the store, gaps zero
};

// No gradients. loss_sum: cross entropy over the targets.
ReferenceResult ReferenceForward(const ModelConfig& config, const ParameterStore& store,
                                 const Batch& batch, const RunOptions& options,
                                 ReferenceArithmetic arithmetic = ReferenceArithmetic::kFloat64);

// With the gradient of grad_scale * loss_sum.
ReferenceResult ReferenceCrossEntropy(const ModelConfig& config, const ParameterStore& store,
                                      const Batch& batch, const RunOptions& options,
                                      double grad_scale);

struct ReferenceDistillationResult : ReferenceResult {  // of the student; loss_sum: KL over tokens
  double ce_sum = 0;
  int64_t targets = 0;
};

// What DistillationStep computes (model/loss.h): the gradient of kl_grad_scale * KL + ce_grad_scale
// * cross entropy with respect to the student's parameters. ce_sum is there whatever the scale.
ReferenceDistillationResult ReferenceDistillation(const ModelConfig& teacher_config,
                                                  const ParameterStore& teacher,
                                                  const ModelConfig& student_config,
                                                  const ParameterStore& student, const Batch& batch,
                                                  const DistillationOptions& options);

// How far a mixer's output is from its target: the mean over tokens and features of the squared
// difference, or the mean over tokens of its Euclidean norm, times 1 / sqrt(features).
enum class MixerDistance : uint8_t { kMeanSquare, kEuclidean };

// HALO's alignment (docs/math/halo.md 2): every layer's mixer of `mixers_config` on the teacher's
// normalised input against the teacher's output there. loss_sum is the mean over the layers, count
// the tokens, gradients (of grad_scale * loss_sum) are laid out as `mixers`, which needs the
// mixers' tensors only. Attention is dense, as in that stage.
ReferenceResult ReferenceAlignment(const ModelConfig& teacher_config, const ParameterStore& teacher,
                                   const ModelConfig& mixers_config, const ParameterStore& mixers,
                                   const Batch& batch, MixerDistance distance, double grad_scale);

}  // namespace sala::model
