// One pass of the model with a loss, forward and backward together, for the recipes.
//
// With several ranks on the same samples a result is this rank's part: added over the ranks
// (Mesh::sample_group) the parts are the result of the batch.
#pragma once

#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/kl_divergence/kl_divergence.h"
#include "model/model.h"

namespace sala::model {

// Adds the gradient of grad_scale * (sum of cross entropy over the batch's targets) to `gradients`.
kernels::CrossEntropyResult CrossEntropyStep(const Context& ctx, Arena& arena, const Model& model,
                                             const Batch& batch, const RunOptions& options,
                                             float grad_scale, const ModelTensors& gradients);

// The losses on given hidden states [part, H] of the batch (Model::ForwardOnly), without gradients.
kernels::CrossEntropyResult HeadCrossEntropy(const Context& ctx, Arena& arena, const Model& model,
                                             const Batch& batch, const Tensor& hidden,
                                             const Tensor& token_loss = {});
kernels::KlDivergenceResult HeadKl(const Context& ctx, Arena& arena, const Model& teacher,
                                   const Tensor& teacher_hidden, const Model& student,
                                   const Tensor& student_hidden, const Batch& batch);

// The loss without gradients; token_loss, if not empty, is f32 [T] of this
// rank's range of the tokens.
kernels::CrossEntropyResult EvaluateCrossEntropy(const Context& ctx, Arena& arena,
                                                 const Model& model, const Batch& batch,
                                                 const RunOptions& options,
                                                 const Tensor& token_loss = {});

struct DistillationResult {
  kernels::KlDivergenceResult kl;
  kernels::CrossEntropyResult ce;  // zero when ce_weight is 0
};

struct DistillationOptions {
  RunOptions student;
  RunOptions teacher;
  float kl_grad_scale = 1.0F;  // 1 / tokens of the global batch
  float ce_grad_scale = 0.0F;  // ce_weight / targets of the global batch; 0: no cross entropy term
  float temperature = 1.0F;
};

// KL(teacher || student) over every token of the batch (docs/math/halo.md 6). Gradients of the
// student accumulate.
DistillationResult DistillationStep(const Context& ctx, Arena& arena, const Model& teacher,
                                    const Model& student, const Batch& batch,
                                    const DistillationOptions& options,
                                    const ModelTensors& gradients);

// KL without gradients.
kernels::KlDivergenceResult EvaluateKl(const Context& ctx, Arena& arena, const Model& teacher,
                                       const Model& student, const Batch& batch,
                                       const RunOptions& options);

}  // namespace sala::model
