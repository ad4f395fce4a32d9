#include "recipes/verify_pass.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "core/rng.h"
#include "data/stream.h"
#include "data/tokenizer.h"
#include "recipes/halo/transfer.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

using model::ParameterKind;
using model::ParameterSpec;
using model::ParameterStore;

// Norm gains around 1 and not 1, matrices of three times their start: gradients are compared away
// from special points, and the scores of block selection lie far enough apart that float32 and
// float64 choose alike.
void MoveFromStart(ParameterStore& store) {
  PhiloxStream rng("verify_weights|gains");
  for (const ParameterSpec& spec : store.specs()) {
    float* data = store.data() + spec.offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (spec.kind == ParameterKind::kVector)
        data[i] += static_cast<float>(0.2 * rng.NextNormal());
      if (spec.kind == ParameterKind::kMatrix) data[i] *= 3;
    }
  }
}

ParameterStore DrawModel(const model::ModelConfig& config, int64_t seed) {
  ParameterStore store(model::ParameterSpecs(config));
  model::InitialiseParameters(config, seed, store);
  MoveFromStart(store);
  return store;
}

bool Selects(const model::Batch& batch, const kernels::SparseAttentionConfig& sparse) {
  const int64_t least = std::max(sparse.dense_len, (sparse.total_blocks() + 1) * sparse.block_size);
  for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
    if (batch.cu_seqlens[s + 1] - batch.cu_seqlens[s] >= least) return true;
  }
  return false;
}

// The first micro-batch of the stage's samples; with sparse attention the first that selects.
StatusOr<model::Batch> FirstBatch(const StageConfig& stage, const std::string& stream_name,
                                  const PlanInput& plan, const data::Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(
      auto stream,
      data::SampleStream::Open(stage.data, stream_name, plan.batch.seq_len_tokens, tokenizer));
  const int64_t size =
      std::min(plan.batch.micro_batch_sequences, plan.batch.global_batch_sequences());
  constexpr int64_t kTries = 64;
  for (int64_t first = 0; first < kTries * size; first += size) {
    std::vector<data::PackedSample> samples;
    for (int64_t i = 0; i < size; ++i) {
      SALA_ASSIGN_OR_RETURN(data::PackedSample sample, stream->Get(first + i));
      samples.push_back(std::move(sample));
    }
    model::Batch batch = MakeBatch(samples);
    if (!plan.sparse_attention || !plan.model.has_softmax() || Selects(batch, plan.model.sparse))
      return batch;
  }
  return MakeError(ExitCode::kInternal, "INTERNAL",
                   "stage " + stage.name + ": no made document is long enough for block selection");
}

// What decides the numbers of a pass; equal for stages that differ in rates and steps only.
std::string KeyOf(const StageConfig& stage, const PlanInput& plan) {
  HaloConfig halo = stage.halo.value_or(HaloConfig());
  return std::to_string(static_cast<int>(plan.phase)) + EmitConfig(plan.model) +
         EmitConfig(plan.teacher) + std::to_string(plan.sparse_attention) +
         std::to_string(plan.recompute) + std::to_string(static_cast<int>(plan.trainable)) +
         std::to_string(static_cast<int>(stage.kind)) +
         std::to_string(static_cast<int>(stage.data.packing)) +
         std::to_string(stage.data.document_mask) + std::to_string(halo.ce_weight) +
         std::to_string(halo.temperature) + std::to_string(static_cast<int>(halo.align_loss));
}

}  // namespace

void DrawWeights(int64_t seed, VerifyPass* pass) {
  const PlanInput& plan = pass->plan;
  const int64_t model_seed = 2 * seed;
  if (plan.phase == PlanPhase::kAlign) {
    pass->teacher = DrawModel(plan.model, model_seed + 1);
    pass->params = TransferMixers(plan.model, pass->teacher, {.seed = model_seed});
    // Copies of the teacher's tensors: moved, so that the mixers are not the teacher's function.
    PhiloxStream rng("verify_weights|mixers");
    float* data = pass->params.data();
    for (const ParameterSpec& spec : pass->params.specs()) {
      for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i)
        data[i] *= static_cast<float>(1 + 0.2 * rng.NextNormal());
    }
    return;
  }
  if (plan.phase == PlanPhase::kDistil) pass->teacher = DrawModel(plan.teacher, model_seed + 1);
  pass->params = DrawModel(plan.model, model_seed);
}

StatusOr<std::vector<VerifyPass>> MakeVerifyPasses(const ScaledPipeline& scaled) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer("bytes"));
  model::ModelConfig model = scaled.start;
  std::vector<VerifyPass> passes;
  std::set<std::string> seen;
  for (const StageConfig& stage : scaled.config.stages) {
    auto plans = PlanStage(stage, scaled.config.run, 1, &model);
    if (!plans.ok()) return Annotate(plans.status(), "stage " + stage.name);
    for (NamedPlan& plan : *plans) {
      if (!seen.insert(KeyOf(stage, plan.input)).second) continue;
      const bool halo = stage.kind == StageKind::kHalo;
      SALA_ASSIGN_OR_RETURN(model::Batch batch,
                            FirstBatch(stage, halo ? stage.name + "/" + plan.phase : stage.name,
                                       plan.input, *tokenizer));
      VerifyPass& pass = passes.emplace_back();
      pass.where = "stage " + stage.name + (halo ? ", " + plan.phase : "");
      pass.plan = std::move(plan.input);
      if (halo) pass.halo = *stage.halo;
      pass.batch = std::move(batch);
      DrawWeights(0, &pass);
    }
  }
  return passes;
}

std::string LayerOfTensor(const std::string& name) {
  const std::string prefix = "model.layers.";
  if (name.rfind(prefix, 0) != 0) return "";
  return "layer " + name.substr(prefix.size(), name.find('.', prefix.size()) - prefix.size());
}

}  // namespace sala::recipes
