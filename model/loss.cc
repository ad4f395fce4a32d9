#include "model/loss.h"

#include "core/check.h"
#include "kernels/tensor_ops/tensor_ops.h"

namespace sala::model {
namespace {

// Tokens whose logits exist at once. A GPU needs more rows to fill it: with a vocabulary of 73,448
// this is 0.6 GB of float32.
int64_t ChunkTokens(const Context& ctx) { return ctx.cuda() ? 2048 : 512; }

}  // namespace

kernels::CrossEntropyResult CrossEntropyStep(const Context& ctx, Arena& arena, const Model& model,
                                             const Batch& batch, const RunOptions& options,
                                             float grad_scale, const ModelTensors& gradients) {
  const ArenaScope scope(arena);
  const ForwardState state = model.Forward(ctx, arena, batch, options);
  const Tensor dhidden = arena.New(ctx.activation(), {batch.size(), model.config().hidden_size});
  const kernels::CrossEntropyResult result =
      kernels::CrossEntropy(ctx, state.hidden, model.tensors().head, state.tables.labels,
                            {.logit_scale = model.logit_scale(),
                             .grad_scale = grad_scale,
                             .chunk_tokens = ChunkTokens(ctx)},
                            {}, dhidden, gradients.head);
  model.Backward(ctx, arena, batch, options, state, dhidden, gradients);
  return result;
}

kernels::CrossEntropyResult EvaluateCrossEntropy(const Context& ctx, Arena& arena,
                                                 const Model& model, const Batch& batch,
                                                 const RunOptions& options,
                                                 const Tensor& token_loss) {
  const ArenaScope scope(arena);
  const Tensor hidden = model.ForwardOnly(ctx, arena, batch, options);
  return kernels::CrossEntropy(
      ctx, hidden, model.tensors().head, ToDevice(ctx, arena, batch.labels),
      {.logit_scale = model.logit_scale(), .chunk_tokens = ChunkTokens(ctx)}, token_loss, {}, {});
}

DistillationResult DistillationStep(const Context& ctx, Arena& arena, const Model& teacher,
                                    const Model& student, const Batch& batch,
                                    const DistillationOptions& options,
                                    const ModelTensors& gradients) {
  SALA_CHECK(teacher.config().vocab_size == student.config().vocab_size)
      << "teacher and student share a vocabulary";
  const ArenaScope scope(arena);
  DistillationResult result;
  const Tensor teacher_hidden = teacher.ForwardOnly(ctx, arena, batch, options.teacher);
  const ForwardState state = student.Forward(ctx, arena, batch, options.student);
  const Tensor dhidden = arena.New(ctx.activation(), {batch.size(), student.config().hidden_size});
  result.kl = kernels::KlDivergence(ctx, teacher_hidden, teacher.tensors().head, state.hidden,
                                    student.tensors().head,
                                    {.teacher_logit_scale = teacher.logit_scale(),
                                     .student_logit_scale = student.logit_scale(),
                                     .temperature = options.temperature,
                                     .grad_scale = options.kl_grad_scale,
                                     .chunk_tokens = ChunkTokens(ctx)},
                                    dhidden, gradients.head);
  if (options.ce_grad_scale > 0) {
    const Tensor dce = arena.New(ctx.activation(), {batch.size(), student.config().hidden_size});
    result.ce =
        kernels::CrossEntropy(ctx, state.hidden, student.tensors().head, state.tables.labels,
                              {.logit_scale = student.logit_scale(),
                               .grad_scale = options.ce_grad_scale,
                               .chunk_tokens = ChunkTokens(ctx)},
                              {}, dce, gradients.head);
    kernels::Add(ctx, dce, dhidden);
  }
  student.Backward(ctx, arena, batch, options.student, state, dhidden, gradients);
  return result;
}

kernels::KlDivergenceResult EvaluateKl(const Context& ctx, Arena& arena, const Model& teacher,
                                       const Model& student, const Batch& batch,
                                       const RunOptions& options) {
  const ArenaScope scope(arena);
  const Tensor teacher_hidden = teacher.ForwardOnly(ctx, arena, batch, options);
  const Tensor student_hidden = student.ForwardOnly(ctx, arena, batch, options);
  return kernels::KlDivergence(
      ctx, teacher_hidden, teacher.tensors().head, student_hidden, student.tensors().head,
      {.teacher_logit_scale = teacher.logit_scale(), .student_logit_scale = student.logit_scale()},
      {}, {});
}

}  // namespace sala::model
