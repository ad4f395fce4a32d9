// The keys of stages and runs, with defaults and limits.
#include "recipes/config.h"

#include <algorithm>
#include <cctype>
#include <limits>

namespace sala::recipes {
namespace {

// Names become files and streams of random numbers.
bool IsName(const std::string& name) {
  const auto plain = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; };
  return !name.empty() && name.size() <= 64 && plain(name[0]) &&
         std::all_of(name.begin(), name.end(),
                     [&](char c) { return plain(c) || c == '_' || c == '-' || c == '.'; });
}

// A rate that is still warming up when the phase ends is a mistake in one of the two numbers.
void CheckWarmup(ConfigBinder& b, const ScheduleConfig& schedule, const BatchConfig& batch) {
  if (!b.reading() || batch.steps == 0 || schedule.warmup_steps < batch.steps) return;
  b.Error("schedule", "CFG-CONFLICT",
          "warmup_steps " + std::to_string(schedule.warmup_steps) + " leaves nothing of " +
              std::to_string(batch.steps) + " steps; lower it");
}

constexpr double kMaxSteps = 1e9;

// A stage's length is given in steps or in tokens.
void BindTokens(ConfigBinder& b, BatchConfig* batch) {
  b.Field("tokens", &batch->tokens, {.min = 1, .max = 1e15});
  const bool in_tokens = b.Present("tokens");
  if (b.Present("steps") && in_tokens) {
    b.Error("tokens", "CFG-CONFLICT",
            "steps and tokens both say how long the stage is; keep one of them");
  } else if (!b.Present("steps") && !in_tokens) {
    b.Error("steps", "CFG-MISSING",
            "expected steps (updates), or tokens (a budget that becomes steps)");
  }
  if (!in_tokens || batch->global_batch_tokens <= 0 || batch->tokens <= 0) return;
  const int64_t global = batch->global_batch_tokens;
  const int64_t steps = std::max<int64_t>(1, (batch->tokens + global / 2) / global);
  if (static_cast<double>(steps) > kMaxSteps) {
    b.Error("tokens", "CFG-RANGE",
            "makes " + std::to_string(steps) + " steps of " + std::to_string(global) +
                " tokens, expected at most 1e9; lower it");
  }
  batch->steps = steps;
}

}  // namespace

void ScheduleConfig::Bind(ConfigBinder& b) {
  b.Enum("shape", &shape,
         {{"constant", ScheduleShape::kConstant},
          {"exponential", ScheduleShape::kExponential},
          {"linear", ScheduleShape::kLinear},
          {"cosine", ScheduleShape::kCosine}});
  b.Field("peak_lr", &peak_lr, {.required = true, .min = 0});
  // Not written for a constant rate, which is refused with it: a resolved configuration is read
  // again when its stage is resumed.
  if (b.reading() || shape != ScheduleShape::kConstant) b.Field("final_lr", &final_lr, {.min = 0});
  b.Field("warmup_steps", &warmup_steps, {.min = 0});
  if (!b.reading()) return;
  if (shape == ScheduleShape::kConstant && b.Present("final_lr")) {
    b.Error("final_lr", "CFG-CONFLICT",
            "a constant schedule has no final_lr; remove it or choose another shape");
  }
  if (shape != ScheduleShape::kConstant && !b.Present("final_lr")) {
    b.Error("shape", "CFG-MISSING", "this shape needs final_lr");
  }
  if (shape == ScheduleShape::kExponential && (peak_lr <= 0 || final_lr <= 0)) {
    b.Error("final_lr", "CFG-RANGE", "an exponential schedule needs peak_lr and final_lr above 0");
  }
}

void OptimizerConfig::Bind(ConfigBinder& b) {
  constexpr double kBelowOne = 1 - 1e-9;  // 1 would divide by zero
  b.Field("beta1", &beta1, {.min = 0, .max = kBelowOne});
  b.Field("beta2", &beta2, {.min = 0, .max = kBelowOne});
  b.Field("eps", &eps, {.min = 1e-30});  // 0 would divide by zero where no gradient ever came
  b.Field("weight_decay", &weight_decay, {.min = 0});
  b.Field("clip_norm", &clip_norm, {.min = 0});
  b.Field("matrix_lr_multiplier", &matrix_lr_multiplier, {.min = 0});
  b.Field("embedding_lr_multiplier", &embedding_lr_multiplier, {.min = 0});
  b.Field("vector_lr_multiplier", &vector_lr_multiplier, {.min = 0});
  b.Field("head_lr_multiplier", &head_lr_multiplier, {.min = 0});
  b.Field("mixer_lr_multiplier", &mixer_lr_multiplier, {.min = 0});
  b.Field("max_bad_steps", &max_bad_steps, {.min = 0});
}

void BatchConfig::Bind(ConfigBinder& b) {
  // Packed positions are 32-bit, and products of these must stay far from 64 bits.
  b.Field("seq_len_tokens", &seq_len_tokens, {.required = true, .min = 1, .max = 1 << 26});
  b.Field("global_batch_tokens", &global_batch_tokens, {.required = true, .min = 1, .max = 1e12});
  b.Field("micro_batch_sequences", &micro_batch_sequences, {.min = 1, .max = 1 << 20});
  b.Field("steps", &steps, {.min = 1, .max = kMaxSteps});
  if (b.reading()) BindTokens(b, this);
  b.Field("rank_independent_sums", &rank_independent_sums);
  if (b.reading() && seq_len_tokens * micro_batch_sequences > std::numeric_limits<int32_t>::max()) {
    b.Error("micro_batch_sequences", "CFG-RANGE",
            "a micro-batch of " + std::to_string(micro_batch_sequences) + " x " +
                std::to_string(seq_len_tokens) + " tokens is above 2^31 - 1; make it smaller");
  }
  if (b.reading() && seq_len_tokens > 0 && global_batch_tokens % seq_len_tokens != 0) {
    b.Error("global_batch_tokens", "CFG-CONFLICT",
            "found " + std::to_string(global_batch_tokens) +
                ", expected a multiple of seq_len_tokens " + std::to_string(seq_len_tokens) +
                "; the nearest is " +
                std::to_string(std::max<int64_t>(
                                   1, (global_batch_tokens + seq_len_tokens / 2) / seq_len_tokens) *
                               seq_len_tokens));
  }
}

void ValidationConfig::Bind(ConfigBinder& b) { b.Field("every_steps", &every_steps, {.min = 0}); }

void CheckpointConfig::Bind(ConfigBinder& b) {
  b.Field("every_steps", &every_steps, {.min = 0});
  b.Field("keep_last", &keep_last, {.min = 1});
  b.Field("max_failures", &max_failures, {.min = 1});
}

void HaloPhaseConfig::Bind(ConfigBinder& b) {
  b.Section("batch", &batch, {.required = true});
  b.Section("schedule", &schedule, {.required = true});
  b.Section("optimizer", &optimizer);
  CheckWarmup(b, schedule, batch);
}

void HaloScoreConfig::Bind(ConfigBinder& b) {
  b.Field("text_tokens", &text_tokens, {.min = 1});
  b.Field("recall_items", &recall_items, {.min = 0});
  b.Field("recall_length_tokens", &recall_length_tokens, {.min = 1});
  b.Field("bootstrap", &bootstrap, {.min = 0});
  b.Field("eps", &eps, {.min = 1e-30});  // the best layer of both scores would otherwise be 0 / 0
  b.Field("difference_lambda", &difference_lambda, {.min = 0});
}

void HaloConfig::Bind(ConfigBinder& b) {
  b.Field("keep", &keep);
  b.Field("softmax_layers", &softmax_layers, {.min = 0});
  b.Enum("selector", &selector,
         {{"halo", Selector::kHalo},
          {"recall_drop", Selector::kRecallDrop},
          {"difference", Selector::kDifference},
          {"kl_swap", Selector::kKlSwap},
          {"greedy", Selector::kGreedy},
          {"uniform", Selector::kUniform},
          {"random", Selector::kRandom},
          {"explicit", Selector::kExplicit}});
  b.Field("explicit_layers", &explicit_layers);
  b.Section("score", &score);
  b.Section("align", &align, {.required = true});
  b.Enum("align_loss", &align_loss, {{"mse", AlignLoss::kMse}, {"l2_norm", AlignLoss::kL2Norm}});
  b.Field("align_from_teacher", &align_from_teacher);
  b.Section("distil", &distil, {.required = true});
  b.Enum("trainable", &trainable,
         {{"linear_mixers", HaloTrainable::kLinearMixers},
          {"mixers", HaloTrainable::kMixers},
          {"all", HaloTrainable::kAll}});
  b.Enum("nope_at", &nope_at,
         {{"distil", HaloMoment::kDistil}, {"next_stage", HaloMoment::kNextStage}});
  b.Enum("softmax_gate_at", &softmax_gate_at,
         {{"distil", HaloMoment::kDistil}, {"next_stage", HaloMoment::kNextStage}});
  b.Enum("softmax_gate_init", &softmax_gate_init,
         {{"small_normal", GateInit::kSmallNormal}, {"identity", GateInit::kIdentity}});
  b.Enum("softmax_qk_norm", &softmax_qk_norm,
         {{"fold", QkNormForm::kFold}, {"keep", QkNormForm::kKeep}});
  b.Enum("qk_norm_fold_at", &qk_norm_fold_at,
         {{"distil", HaloMoment::kDistil}, {"next_stage", HaloMoment::kNextStage}});
  b.Field("temperature", &temperature, {.min = 1e-3});
  b.Field("ce_weight", &ce_weight, {.min = 0});
  b.Section("finetune", &finetune);
  b.Field("logit_scale_grid", &logit_scale_grid, {.min = 1});
  b.Field("logit_scale_length_tokens", &logit_scale_length_tokens, {.min = 0});
  if (b.reading() && (selector == Selector::kExplicit) != !explicit_layers.empty()) {
    b.Error("selector", "CFG-CONFLICT",
            "explicit_layers goes with selector: explicit, and only with it");
  }
}

void InitConfig::Bind(ConfigBinder& b) {
  b.Field("path", &path, {.required = true});
  b.Field("carry_optimizer", &carry_optimizer);
  b.Section("model", &model);
}

void StageConfig::Bind(ConfigBinder& b) {
  b.Field("name", &name, {.required = true});
  if (b.reading() && !IsName(name)) {
    b.Error("name", "CFG-RANGE",
            "found '" + Printable(name) +
                "', expected letters, digits, '_', '-' and '.' (at most 64, starting with a letter "
                "or digit)");
  }
  b.Field("tokenizer", &tokenizer);
  b.Section("init_from", &init_from);
  b.Field("carry_optimizer", &carry_optimizer);
  b.Section("model", &model);
  b.Field("seed", &seed, {.min = 0});
  b.Section("data", &data, {.required = true});
  b.Section("validation", &validation);
  b.Section("checkpoint", &checkpoint);
  b.Section("parallel", &parallel);
  b.Section("eval", &eval);
  if (kind == StageKind::kHalo) {
    b.Section("halo", &halo, {.required = true});
    return;
  }
  b.Field("sparse_attention", &sparse_attention);
  b.Field("recompute", &recompute);
  b.Section("batch", &batch, {.required = true});
  b.Section("schedule", &schedule, {.required = true});
  b.Section("optimizer", &optimizer);
  CheckWarmup(b, schedule, batch);
}

bool TraceConfig::Records(int64_t step, int rank) const {
  return std::find(steps.begin(), steps.end(), step) != steps.end() &&
         std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
}

void TraceConfig::Bind(ConfigBinder& b) {
  b.Field("steps", &steps, {.min = 1});
  b.Field("ranks", &ranks, {.min = 0});
}

void RunConfig::Bind(ConfigBinder& b) {
  b.Field("dir", &dir, {.required = true});
  b.Field("resume", &resume);
  b.Field("resume_strict", &resume_strict);
  b.Enum("device", &device, {{"cpu", DeviceKind::kCpu}, {"cuda", DeviceKind::kCuda}});
  b.Field("deterministic", &deterministic);
  b.Field("threads", &threads, {.min = 1, .max = 1024});
  b.Field("log_every_steps", &log_every_steps, {.min = 1});
  b.Field("tensorboard", &tensorboard);
  b.Field("prometheus", &prometheus);
  b.Section("trace", &trace);
  b.Section("watchdog", &watchdog);
}

}  // namespace sala::recipes
