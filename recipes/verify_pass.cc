#include "recipes/verify_pass.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
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

// Weights whose gradients are compared away from special points: norm gains around 1 and not 1;
// matrices that give numbers of size 1.2 from numbers of size 1, so that scores and gates are
// neither nearly linear nor saturated, whatever the configuration's initializer; logits of
// size 1.5.
ParameterStore DrawModel(const model::ModelConfig& config, int64_t seed) {
  ParameterStore store(model::ParameterSpecs(config));
  model::InitialiseParameters(config, seed, store);
  PhiloxStream rng("verify_weights|gains");
  const double head =
      1.5 * config.width_multiplier() / std::sqrt(static_cast<double>(config.hidden_size));
  for (const ParameterSpec& spec : store.specs()) {
    if (spec.kind == ParameterKind::kVector) {
      for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i)
        store.data()[i] += static_cast<float>(0.2 * rng.NextNormal());
    } else if (spec.kind == ParameterKind::kMatrix) {
      const double inputs = std::sqrt(static_cast<double>(spec.shape[1]));
      model::InitialiseNormal(seed, 1.2 / inputs, store, spec.name);
    } else if (spec.kind == ParameterKind::kHead || config.tie_word_embeddings) {
      model::InitialiseNormal(seed, head, store, spec.name);
    }
  }
  return store;
}

// Documents of a sample, and whether one is long enough that its tokens cannot see all blocks.
struct Content {
  int64_t documents = 0;
  bool selects = false;
};

Content ContentOf(const data::PackedSample& sample, const kernels::SparseAttentionConfig& sparse) {
  const int64_t least = std::max(sparse.dense_len, (sparse.total_blocks() + 1) * sparse.block_size);
  Content content;
  for (const data::SegmentMeta& segment : sample.segments) {
    ++content.documents;
    content.selects = content.selects || segment.length >= least;
  }
  return content;
}

// Of the stage's first samples that with the most documents, with sparse attention the first that
// selects, and others in order: a micro-batch, and three documents or more.
StatusOr<model::Batch> DrawBatch(const StageConfig& stage, const std::string& stream_name,
                                 const PlanInput& plan, const data::Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(
      auto stream,
      data::SampleStream::Open(stage.data, stream_name, plan.batch.seq_len_tokens, tokenizer));
  constexpr size_t kSamples = 512;  // some of all kinds: packing puts the fullest first
  constexpr int64_t kLeastDocuments = 3;
  std::vector<data::PackedSample> samples;
  std::vector<Content> contents;
  for (size_t g = 0; g < kSamples; ++g) {
    SALA_ASSIGN_OR_RETURN(data::PackedSample sample, stream->Get(static_cast<int64_t>(g)));
    contents.push_back(ContentOf(sample, plan.model.sparse));
    samples.push_back(std::move(sample));
  }
  const auto most = std::max_element(
      contents.begin(), contents.end(),
      [](const Content& a, const Content& b) { return a.documents < b.documents; });
  std::vector<size_t> order = {static_cast<size_t>(most - contents.begin())};
  if (plan.sparse_attention && plan.model.has_softmax()) {
    const auto first = std::find_if(contents.begin(), contents.end(),
                                    [](const Content& content) { return content.selects; });
    if (first == contents.end()) {
      return MakeError(
          ExitCode::kInternal, "INTERNAL",
          "stage " + stage.name + ": no made document is long enough to select blocks");
    }
    order.push_back(static_cast<size_t>(first - contents.begin()));
  }
  for (size_t g = 0; g < kSamples; ++g) order.push_back(g);
  std::vector<data::PackedSample> taken;
  std::set<size_t> seen;
  int64_t documents = 0;
  for (const size_t g : order) {
    if (!seen.insert(g).second) continue;
    taken.push_back(samples[g]);
    documents += contents[g].documents;
    const bool enough = static_cast<int64_t>(taken.size()) >= plan.batch.micro_batch_sequences &&
                        documents >= kLeastDocuments;
    // `order` begins with what must be in it.
    if (enough && seen.size() >= order.size() - kSamples) break;
  }
  return MakeBatch(taken);
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
                            DrawBatch(stage, halo ? stage.name + "/" + plan.phase : stage.name,
                                      plan.input, *tokenizer));
      VerifyPass& pass = passes.emplace_back();
      pass.where = "stage " + stage.name + (halo ? ", " + plan.phase : "");
      pass.plan = std::move(plan.input);
      if (halo) pass.halo = *stage.halo;
      pass.batch = std::move(batch);
      pass.chat = stage.kind == StageKind::kSft;
      pass.document_mask = stage.data.document_mask;
      DrawWeights(0, &pass);
    }
  }
  return passes;
}

std::string ShortText(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2g", value);
  return text;
}

std::string ExactText(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", value);
  return text;
}

std::string LayerOfTensor(const std::string& name) {
  const std::string prefix = "model.layers.";
  if (name.rfind(prefix, 0) != 0) return "";
  return "layer " + name.substr(prefix.size(), name.find('.', prefix.size()) - prefix.size());
}

}  // namespace sala::recipes
