// The YAML of a run: a pipeline file that lists stage files, and the stage files. Reference:
// docs/configuration.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/config.h"
#include "data/stream.h"
#include "model/config.h"
#include "parallel/mesh.h"
#include "parallel/watchdog.h"
#include "recipes/eval_config.h"

namespace sala::recipes {

enum class ScheduleShape : uint8_t { kConstant, kExponential, kLinear, kCosine };

// Learning rate as a pure function of the step in the stage (recipes/schedule.h).
struct ScheduleConfig {
  ScheduleShape shape = ScheduleShape::kConstant;
  double peak_lr = 0;
  double final_lr = 0;  // approached at the end: the rate of step `steps`; unused when constant
  int64_t warmup_steps = 0;  // linear from 0: the first update has rate 0 when this is above 0

  void Bind(ConfigBinder& b);
};

struct OptimizerConfig {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay =
      0.1;  // on 2-D weights of the blocks and, if not tied, the head; never on norms and embedding
  double clip_norm = 1.0;           // of the global gradient; 0: no clipping
  double matrix_lr_multiplier = 0;  // 0: 1 / m of muP (m = hidden_size / dim_model_base)
  double embedding_lr_multiplier = 1;
  double vector_lr_multiplier = 1;
  double head_lr_multiplier = 1;
  double mixer_lr_multiplier = 1;  // on top of the above, for the tensors of linear mixers
  int64_t max_bad_steps = 10;  // non-finite steps skipped in a row before the run ends with exit 76

  void Bind(ConfigBinder& b);
};

struct BatchConfig {
  int64_t seq_len_tokens = 0;
  int64_t global_batch_tokens = 0;    // a multiple of seq_len_tokens; not necessarily of the ranks
  int64_t micro_batch_sequences = 1;  // sequences per forward pass of a rank
  int64_t steps = 0;
  // The budget that `steps` were made of, to the nearest step; 0: steps were given. Only steps are
  // written again.
  int64_t tokens = 0;
  // Gradients, losses and norms are added in an order that does not know the number of ranks: 1, 2,
  // 4, ... ranks give the same bits.
  bool rank_independent_sums = false;

  int64_t global_batch_sequences() const { return global_batch_tokens / seq_len_tokens; }
  int64_t micro_batches() const {  // of a step, the last one perhaps smaller
    return (global_batch_sequences() + micro_batch_sequences - 1) / micro_batch_sequences;
  }
  void Bind(ConfigBinder& b);
};

struct ValidationConfig {
  int64_t every_steps =
      0;  // 0: before the first and after the last step only. What is held out: data.validation

  void Bind(ConfigBinder& b);
};

struct CheckpointConfig {
  int64_t every_steps = 0;  // 0: at the end of the stage only
  int64_t keep_last = 3;
  int64_t max_failures = 3;  // failed saves in a row before the run ends with exit 74

  void Bind(ConfigBinder& b);
};

enum class HaloTrainable : uint8_t { kLinearMixers, kMixers, kAll };
enum class HaloMoment : uint8_t { kDistil, kNextStage };
enum class QkNormForm : uint8_t { kFold, kKeep };
enum class GateInit : uint8_t { kSmallNormal, kIdentity };
enum class Selector : uint8_t {
  kHalo,
  kRecallDrop,
  kDifference,
  kKlSwap,
  kGreedy,
  kUniform,
  kRandom,
  kExplicit
};
enum class AlignLoss : uint8_t { kMse, kL2Norm };

// One training phase inside the HALO stage. By default all tensors have one rate and nothing
// decays, as in the published conversion.
struct HaloPhaseConfig {
  BatchConfig batch;
  ScheduleConfig schedule;
  OptimizerConfig optimizer = {.weight_decay = 0, .matrix_lr_multiplier = 1};

  void Bind(ConfigBinder& b);
};

struct HaloScoreConfig {
  int64_t text_tokens = 32768;  // held-out text for C = exp(-loss per target) and for KL
  int64_t recall_items = 64;    // synthetic recall prompts, half passkey and half multi-key needle
  int64_t recall_length_tokens = 128;
  int64_t bootstrap = 200;  // resamples of items for the share in which each layer is kept; 0: off
  double eps = 1e-6;        // denominator of the ratio rule
  double difference_lambda = 1.0;

  void Bind(ConfigBinder& b);
};

struct HaloConfig {
  std::vector<int64_t> keep;   // layers that stay softmax by decision; negative counts from the end
  int64_t softmax_layers = 0;  // 0: floor(layers / 4)
  Selector selector = Selector::kHalo;
  std::vector<int64_t> explicit_layers;  // for selector explicit
  HaloScoreConfig score;
  HaloPhaseConfig align;
  AlignLoss align_loss = AlignLoss::kMse;
  bool align_from_teacher = true;  // false: mixers start from random weights (an ablation)
  HaloPhaseConfig distil;
  HaloTrainable trainable = HaloTrainable::kLinearMixers;
  HaloMoment nope_at = HaloMoment::kNextStage;
  HaloMoment softmax_gate_at = HaloMoment::kNextStage;
  GateInit softmax_gate_init = GateInit::kSmallNormal;
  QkNormForm softmax_qk_norm = QkNormForm::kFold;  // of softmax layers, where the teacher has it
  HaloMoment qk_norm_fold_at = HaloMoment::kNextStage;
  double temperature = 1.0;
  double ce_weight = 0.0;
  std::optional<HaloPhaseConfig> finetune;
  std::vector<double> logit_scale_grid;   // candidates for HyPE's a; empty: no fit
  int64_t logit_scale_length_tokens = 0;  // document length of the fit

  void Bind(ConfigBinder& b);
};

enum class StageKind : uint8_t { kPretrain, kHalo, kSft };

struct InitConfig {
  std::string path;              // a checkpoint directory, or an exported model folder
  bool carry_optimizer = false;  // go on with the moments of that checkpoint
  // What the model there must be: another one is refused, and while it is not there yet plans are
  // made of this (recipes/starting_model.h).
  std::optional<model::ModelConfig> model = {};

  void Bind(ConfigBinder& b);
};

struct StageConfig {
  StageKind kind = StageKind::kPretrain;
  std::string name;
  std::string tokenizer;  // a folder, a tokenizer.model, or "bytes"
  std::optional<InitConfig>
      init_from;                 // outside a pipeline; absent in the first stage: random weights
  bool carry_optimizer = false;  // inside a pipeline: keep the previous stage's moments
  std::optional<model::ModelConfig> model;  // only where weights start at random
  bool sparse_attention = false;
  bool recompute = true;
  int64_t seed = 1234;
  BatchConfig batch;
  ScheduleConfig schedule;
  OptimizerConfig optimizer;
  data::DataConfig data;
  ValidationConfig validation;
  CheckpointConfig checkpoint;
  parallel::MeshConfig parallel;
  std::optional<HaloConfig> halo;
  std::optional<EvalConfig> eval;

  void Bind(ConfigBinder& b);
};

// Global steps whose every layer and exchange is recorded in RUN/traces, and the ranks that do so.
struct TraceConfig {
  std::vector<int64_t> steps;  // empty: nothing is recorded
  std::vector<int64_t> ranks = {0};

  bool Records(int64_t step, int rank) const;
  void Bind(ConfigBinder& b);
};

struct RunConfig {
  std::string dir;              // the run directory
  std::string resume = "auto";  // auto | never | a checkpoint directory
  bool resume_strict =
      false;  // auto: a damaged newest checkpoint ends the run instead of falling back
  DeviceKind device = DeviceKind::kCpu;
  bool deterministic = true;  // cuda: algorithms chosen by rule, sums over ranks in order
  int64_t threads = 1;        // compute threads per rank
  int64_t log_every_steps = 1;
  bool tensorboard = true;  // RUN/tb
  bool prometheus = true;   // RUN/metrics.prom
  TraceConfig trace;
  parallel::WatchdogConfig watchdog;
  bool break_lock = false;    // --break-lock; not a key of the file
  bool ignore_gates = false;  // --ignore-gates; likewise
  // What the program says of itself, for RUN/environment.json; not keys of the file.
  std::vector<std::pair<std::string, std::string>> environment;

  void Bind(ConfigBinder& b);
};

// What `sala train` reads: a pipeline, or one stage (then `stages` has one entry).
struct PipelineConfig {
  std::string name;
  bool single_stage = false;  // the file was a stage file
  RunConfig run;
  std::vector<StageConfig> stages;
};

// Reads a pipeline file (kind: pipeline) or a stage file with its `run` section. For a pipeline,
// overrides name the stage first: "stable.schedule.peak_lr=1e-3"; "run.dir=..." and "tokenizer=..."
// go to the pipeline itself.
StatusOr<PipelineConfig> LoadPipeline(const std::string& path,
                                      const std::vector<std::string>& sets);

// Everything with defaults filled in, as files that LoadPipeline reads back: {"config.yaml", text}
// and, for a pipeline,
// {"stages/NAME.yaml", text} for each stage.
std::vector<std::pair<std::string, std::string>> EmitPipeline(const PipelineConfig& config);
std::string EmitStage(const StageConfig& config);

// CFG-RESUME (78) when a stage that is resumed differs from the saved one in anything but what may
// change between starts: parallel, checkpoint, validation and eval sections,
// micro_batch_sequences, recompute.
Status CheckResumable(const StageConfig& now, const std::string& saved_yaml,
                      const std::string& checkpoint);

}  // namespace sala::recipes
