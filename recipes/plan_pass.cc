#include "recipes/plan_pass.h"

#include "core/arena.h"
#include "core/host_memory.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/kl_divergence/kl_divergence.h"
#include "model/units.h"
#include "recipes/halo/transfer.h"
#include "recipes/plan_model.h"
#include "recipes/plan_scratch.h"

namespace sala::recipes {
namespace {

using kernels::Write;
using model::MixerType;
using model::ModelConfig;

// `heads` logits a token, and what the tensor ranks exchange for each chunk of tokens.
void LossChunks(PassContext& ctx, const ModelPass& pass, int64_t heads, int64_t result_bytes,
                const std::vector<int64_t>& floats, bool gradients) {
  const int64_t tokens = pass.share().tokens();
  const int64_t chunk = std::min<int64_t>(ctx.cuda() ? 2048 : 512, tokens);
  const int64_t vocabulary = pass.Vocabulary();
  const MeterScope scope(ctx.scratch);
  for (int64_t i = 0; i < heads; ++i) ctx.scratch.New(chunk * vocabulary * kFloat);
  ctx.scratch.New(chunk * result_bytes);
  if (pass.summed()) {
    for (const int64_t n : floats) GatherScratch(ctx, chunk * n);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      for (const int64_t n : floats) {
        ctx.Count("tp.all_gather",
                  std::min(chunk, tokens - begin) * n * kFloat * (ctx.tp_ranks - 1));
      }
    }
  }
  if (gradients) {
    ProductScratch(ctx, chunk, vocabulary, pass.hidden(), AllTrained(ctx.input));
  } else {
    GemmScratch(ctx, chunk, vocabulary, pass.hidden());
  }
}

void CrossEntropyLoss(PassContext& ctx, const ModelPass& pass, bool gradients = true) {
  LossChunks(ctx, pass, 1, 16, {kernels::kCrossEntropyShardFloats}, gradients);
}

void KlLoss(PassContext& ctx, const ModelPass& pass, bool gradients = true) {
  LossChunks(ctx, pass, 2, 24, {kernels::kKlSoftmaxFloats, kernels::kKlPartFloats}, gradients);
}

// HiddenGradient of model/loss.cc.
void HiddenGradient(ModelPass& pass) {
  pass.Activations(pass.share().part(), pass.hidden());
  if (pass.summed()) pass.Activations(pass.share().tokens(), pass.hidden());
}
void SumHiddenGradient(PassContext& ctx, ModelPass& pass) {
  if (!pass.summed()) return;
  const MeterScope scope(ctx.arena);
  if (ctx.cuda()) pass.Floats(pass.share().tokens() * pass.hidden());
  pass.Sum(pass.hidden(), Write::kOverwrite);
}

// HeadCrossEntropy and HeadKl of model/loss.cc.
void HeadCrossEntropy(PassContext& ctx, ModelPass& pass) {
  const MeterScope scope(ctx.arena);
  pass.EnterHead();
  pass.Gather(pass.hidden());
  CrossEntropyLoss(ctx, pass, /*gradients=*/false);
}
void HeadKl(PassContext& ctx, ModelPass& pass) {
  const MeterScope scope(ctx.arena);
  pass.EnterHead();
  pass.Gather(pass.hidden());  // the teacher's
  pass.Gather(pass.hidden());
  KlLoss(ctx, pass, /*gradients=*/false);
}

void PassTrain(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  ModelPass pass(ctx, ctx.input.model, ctx.input.sparse_attention, ctx.enter);
  const Tables tables = pass.Forward(cu_seqlens, ctx.input.recompute);
  HiddenGradient(pass);
  pass.EnterHead();
  pass.Gather(pass.hidden());
  CrossEntropyLoss(ctx, pass);
  SumHiddenGradient(ctx, pass);
  pass.Backward(tables, ctx.input.recompute, /*embedding_trained=*/true);
}

void PassDistil(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  ModelPass teacher(ctx, ctx.input.teacher, false, ctx.enter_teacher);
  ModelPass student(ctx, ctx.input.model, false, ctx.enter);
  teacher.ForwardOnly(cu_seqlens);
  const Tables tables = student.Forward(cu_seqlens, ctx.input.recompute);
  student.Gather(student.hidden());
  HiddenGradient(student);
  teacher.EnterHead();
  student.EnterHead();
  student.Gather(student.hidden());
  KlLoss(ctx, student);
  if (ctx.input.cross_entropy) {
    student.Activations(student.share().tokens(), student.hidden());
    CrossEntropyLoss(ctx, student);
  }
  SumHiddenGradient(ctx, student);
  student.Backward(tables, ctx.input.recompute, ctx.input.trainable == HaloTrainable::kAll);
}

void PassAlign(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  const ModelConfig all_linear = AllLinear(ctx.input.model);
  ModelPass mixers(ctx, all_linear, false, ctx.enter);
  const Tables tables = mixers.MakeTables(cu_seqlens);
  ModelPass teacher(ctx, ctx.input.model, false, ctx.enter_teacher);
  teacher.ForwardOnly(cu_seqlens, [&](int64_t layer) {
    const MeterScope layer_scope(ctx.arena);
    ctx.enter(model::UnitOfLayer(layer));
    mixers.Activations(mixers.share().part(), mixers.hidden());
    mixers.MixerForward(tables, MixerType::kLightning, Write::kOverwrite);
    mixers.Activations(mixers.share().part(), mixers.hidden());
    mixers.Gather(mixers.hidden());
    mixers.MixerBackward(tables, MixerType::kLightning);
  });
}

}  // namespace

void ArenaMeter::New(int64_t bytes) {
  const int64_t size = std::max(alignment_, (bytes + alignment_ - 1) / alignment_ * alignment_);
  while (at_.block < blocks_.size() && at_.offset + size > blocks_[at_.block].size) {
    ++at_.block;
    at_.offset = 0;
  }
  if (at_.block == blocks_.size()) {
    blocks_.push_back({.size = std::max(size, block_bytes_)});
    at_.offset = 0;
  }
  at_.offset += size;
  at_.used += size;
  blocks_[at_.block].touched = std::max(blocks_[at_.block].touched, at_.offset);
  peak_ = std::max(peak_, at_.used);
}

int64_t ArenaMeter::touched(bool huge_pages) const {
  int64_t bytes = 0;
  for (const Block& block : blocks_) {
    bytes += static_cast<int64_t>(ResidentOfPiece(static_cast<size_t>(block.size),
                                                  static_cast<size_t>(block.touched), huge_pages));
  }
  return bytes;
}

PassContext::PassContext(const PlanInput& plan, int64_t rank)
    : input(plan),
      cp(static_cast<int>(rank / plan.mesh.tp % plan.mesh.cp)),
      cp_ranks(static_cast<int>(plan.mesh.cp)),
      tp(static_cast<int>(rank % plan.mesh.tp)),
      tp_ranks(static_cast<int>(plan.mesh.tp)),
      element(plan.device == DeviceKind::kCuda ? 2 : kFloat),
      arena(plan.device == DeviceKind::kCuda ? 256 : 64, kArenaBlockBytes),
      scratch(plan.device == DeviceKind::kCuda ? 256 : 64, kArenaBlockBytes) {}

void PassMicroBatch(PassContext& ctx, const std::vector<int32_t>& cu_seqlens) {
  switch (ctx.input.phase) {
    case PlanPhase::kTrain:
    case PlanPhase::kFinetune:
      PassTrain(ctx, cu_seqlens);
      break;
    case PlanPhase::kAlign:
      PassAlign(ctx, cu_seqlens);
      break;
    case PlanPhase::kDistil:
      PassDistil(ctx, cu_seqlens);
      break;
  }
}

void PassEvaluate(PassContext& ctx, const ModelConfig& config,
                  const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  ModelPass pass(ctx, config, false, ctx.enter);
  pass.ForwardOnly(cu_seqlens);
  HeadCrossEntropy(ctx, pass);
}

void PassScore(PassContext& ctx, const ModelConfig& teacher,
               const std::vector<int32_t>& cu_seqlens) {
  const MeterScope scope(ctx.arena);
  ModelConfig config = teacher;
  config.mixer_types[0] = NameOf(MixerType::kLightning);
  ModelPass swapped(ctx, config, false, ctx.enter_teacher);
  swapped.ForwardOnly(cu_seqlens, nullptr, /*input_given=*/true);
  const MeterScope measure(ctx.arena);
  HeadCrossEntropy(ctx, swapped);
  swapped.Activations(swapped.share().part(), swapped.hidden());  // the teacher's, kept
  HeadKl(ctx, swapped);
}

}  // namespace sala::recipes
