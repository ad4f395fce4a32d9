#include "model/loss.h"

#include <optional>

#include "core/check.h"
#include "core/trace.h"
#include "kernels/tensor_ops/tensor_ops.h"

namespace sala::model {
namespace {

// Tokens whose logits exist at once. A GPU needs more rows to fill it: with a vocabulary of 73,448
// this is 0.6 GB of float32.
int64_t ChunkTokens(const Context& ctx) { return ctx.cuda() ? 2048 : 512; }

kernels::VocabularyShard Vocabulary(const Model& model) {
  if (model.spread().tp_size() == 1) return {};
  return {.first_row = model.tensors().head.dim(0) * model.spread().tp_rank(),
          .vocab = model.config().vocab_size,
          .exchange = model.spread().exchange()};
}

kernels::CrossEntropyOptions Options(const Context& ctx, const Model& model, float grad_scale) {
  return {.logit_scale = model.logit_scale(),
          .grad_scale = grad_scale,
          .chunk_tokens = ChunkTokens(ctx),
          .shard = Vocabulary(model)};
}

kernels::KlDivergenceOptions Options(const Context& ctx, const Model& teacher, const Model& student,
                                     float temperature, float grad_scale) {
  return {.teacher_logit_scale = teacher.logit_scale(),
          .student_logit_scale = student.logit_scale(),
          .temperature = temperature,
          .grad_scale = grad_scale,
          .chunk_tokens = ChunkTokens(ctx),
          .shard = Vocabulary(student)};
}

// All tensor ranks have the same result; one of them counts.
template <typename Result>
Result Counted(const Model& model, const Result& result) {
  return model.spread().counts() ? result : Result{};
}

int64_t HeadUnit(const Model& model) {
  const ModelConfig& config = model.config();
  return config.tie_word_embeddings ? UnitOfEmbedding() : UnitOfHead(config.num_hidden_layers);
}

void EnterHead(const Model& model) { model.tensors().Enter(HeadUnit(model)); }

// A tied head's gradient goes on with the embedding's.
void LeaveHead(const Model& model, const ModelTensors& gradients) {
  if (!model.config().tie_word_embeddings) gradients.Leave(HeadUnit(model));
}

// The gradient of the hidden states: a loss writes `terms` [T, H], Sum makes the part of it.
struct HiddenGradient {
  HiddenGradient(const Context& ctx, Arena& arena, const Model& model, const TokenShare& share)
      : summed(model.spread().tp_size() > 1),
        part(arena.New(ctx.activation(), {share.part(), model.config().hidden_size})),
        terms(summed ? arena.New(ctx.activation(), {share.tokens(), model.config().hidden_size})
                     : part) {}

  void Sum(const Context& ctx, Arena& arena, const Model& model, const TokenShare& share) const {
    if (summed) model.spread().Sum(ctx, arena, share, terms, part, kernels::Write::kOverwrite);
  }

  bool summed;
  Tensor part, terms;
};

}  // namespace

kernels::CrossEntropyResult CrossEntropyStep(const Context& ctx, Arena& arena, const Model& model,
                                             const Batch& batch, const RunOptions& options,
                                             float grad_scale, const ModelTensors& gradients) {
  const ArenaScope scope(arena);
  const ForwardState state = model.Forward(ctx, arena, batch, options);
  const TokenShare& share = state.tables.share;
  std::optional<PartScope> part(std::in_place, StepPart::kLoss);
  const HiddenGradient dhidden(ctx, arena, model, share);
  EnterHead(model);
  gradients.Enter(HeadUnit(model));
  const kernels::CrossEntropyResult result = kernels::CrossEntropy(
      ctx, model.spread().Gather(ctx, arena, share, state.hidden), model.tensors().head,
      state.tables.labels, Options(ctx, model, grad_scale), {}, dhidden.terms, gradients.head);
  LeaveHead(model, gradients);
  dhidden.Sum(ctx, arena, model, share);
  part.reset();
  model.Backward(ctx, arena, batch, options, state, dhidden.part, gradients);
  return Counted(model, result);
}

kernels::CrossEntropyResult HeadCrossEntropy(const Context& ctx, Arena& arena, const Model& model,
                                             const Batch& batch, const Tensor& hidden,
                                             const Tensor& token_loss) {
  const ArenaScope scope(arena);
  const TokenShare share = model.spread().Share(batch.size());
  EnterHead(model);
  const ConstTensor labels =
      ToDevice(ctx, arena,
               std::span(batch.labels)
                   .subspan(static_cast<size_t>(share.begin), static_cast<size_t>(share.tokens())));
  return Counted(model, kernels::CrossEntropy(ctx, model.spread().Gather(ctx, arena, share, hidden),
                                              model.tensors().head, labels,
                                              Options(ctx, model, 1.0F), token_loss, {}, {}));
}

kernels::KlDivergenceResult HeadKl(const Context& ctx, Arena& arena, const Model& teacher,
                                   const Tensor& teacher_hidden, const Model& student,
                                   const Tensor& student_hidden, const Batch& batch) {
  const ArenaScope scope(arena);
  const TokenShare share = student.spread().Share(batch.size());
  EnterHead(teacher);
  EnterHead(student);
  return Counted(
      student,
      kernels::KlDivergence(
          ctx, teacher.spread().Gather(ctx, arena, share, teacher_hidden), teacher.tensors().head,
          student.spread().Gather(ctx, arena, share, student_hidden), student.tensors().head,
          Options(ctx, teacher, student, 1.0F, 1.0F), {}, {}));
}

kernels::CrossEntropyResult EvaluateCrossEntropy(const Context& ctx, Arena& arena,
                                                 const Model& model, const Batch& batch,
                                                 const RunOptions& options,
                                                 const Tensor& token_loss) {
  const ArenaScope scope(arena);
  const Tensor hidden = model.ForwardOnly(ctx, arena, batch, options);
  return HeadCrossEntropy(ctx, arena, model, batch, hidden, token_loss);
}

DistillationResult DistillationStep(const Context& ctx, Arena& arena, const Model& teacher,
                                    const Model& student, const Batch& batch,
                                    const DistillationOptions& options,
                                    const ModelTensors& gradients) {
  SALA_CHECK(teacher.config().vocab_size == student.config().vocab_size)
      << "teacher and student share a vocabulary";
  const ArenaScope scope(arena);
  const Spread& spread = student.spread();
  DistillationResult result;
  const Tensor teacher_hidden = teacher.ForwardOnly(ctx, arena, batch, options.teacher);
  const ForwardState state = student.Forward(ctx, arena, batch, options.student);
  const TokenShare& share = state.tables.share;
  std::optional<PartScope> part(std::in_place, StepPart::kLoss);
  const Tensor hidden = spread.Gather(ctx, arena, share, state.hidden);
  const HiddenGradient dhidden(ctx, arena, student, share);
  EnterHead(teacher);
  EnterHead(student);
  gradients.Enter(HeadUnit(student));
  result.kl = kernels::KlDivergence(
      ctx, spread.Gather(ctx, arena, share, teacher_hidden), teacher.tensors().head, hidden,
      student.tensors().head,
      Options(ctx, teacher, student, options.temperature, options.kl_grad_scale), dhidden.terms,
      gradients.head);
  if (options.ce_grad_scale > 0) {
    const Tensor dce = arena.New(ctx.activation(), {share.tokens(), student.config().hidden_size});
    result.ce = kernels::CrossEntropy(ctx, hidden, student.tensors().head, state.tables.labels,
                                      Options(ctx, student, options.ce_grad_scale), {}, dce,
                                      gradients.head);
    kernels::Add(ctx, dce, dhidden.terms);
  }
  LeaveHead(student, gradients);
  dhidden.Sum(ctx, arena, student, share);
  part.reset();
  student.Backward(ctx, arena, batch, options.student, state, dhidden.part, gradients);
  return Counted(student, result);
}

kernels::KlDivergenceResult EvaluateKl(const Context& ctx, Arena& arena, const Model& teacher,
                                       const Model& student, const Batch& batch,
                                       const RunOptions& options) {
  const ArenaScope scope(arena);
  const Tensor teacher_hidden = teacher.ForwardOnly(ctx, arena, batch, options);
  const Tensor student_hidden = student.ForwardOnly(ctx, arena, batch, options);
  return HeadKl(ctx, arena, teacher, teacher_hidden, student, student_hidden, batch);
}

}  // namespace sala::model
