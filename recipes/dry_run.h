// Everything about a run that can be said before it has data, weights or devices
// (`sala train --dry-run`). Nothing of the model's size is allocated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "model/parameters.h"
#include "recipes/config.h"
#include "recipes/plan.h"
#include "recipes/resident_plan.h"

namespace sala::recipes {

// Tensors with one learning rate and one weight decay.
struct RateGroup {
  std::string name;  // "matrices", "linear mixers' matrices", ...
  int64_t parameters = 0;
  double multiplier = 0;  // of the scheduled rate
  double weight_decay = 0;
};

// Before update `step` (from 0), when `tokens` were trained on.
struct RatePoint {
  int64_t step = 0, tokens = 0;
  double rate = 0;  // scheduled; a group's is this times its multiplier
};

struct ParameterCount {
  std::string kind;
  int64_t parameters = 0;
};

struct PhaseSheet {
  std::string name;
  PlanInput input;
  std::vector<ParameterCount> parameters;  // of the model, or of alignment's mixers
  int64_t all_parameters = 0;
  int64_t trained_parameters = 0;
  std::vector<RateGroup> groups;  // of what is trained
  std::vector<RatePoint> points;  // first, end of warm-up, ten between, last
  WorkPlan work;
  model::ProductWeights weights;  // of work.forward.products, by layer
  MemoryPlan memory;              // the larger of the first and the last rank
  ResidentPlan resident;          // of the same rank
  int64_t tokens() const { return input.batch.steps * input.batch.global_batch_tokens; }
};

struct StageSheet {
  std::string name;
  std::vector<PhaseSheet> phases;
  std::vector<std::string> notes;  // allowed, but perhaps not meant
  bool data_checked = false;       // datasets, epochs and recall prompts, as the run checks them
};

struct DryRunSheet {
  int64_t ranks = 0;
  std::vector<StageSheet> stages;
  std::vector<std::string> missing;  // inputs that a run needs and that are not there, a line each
};

// The fewest ranks that every stage's mesh can use.
int LeastRanks(const PipelineConfig& config);

// Refuses what the run would refuse as far as the inputs that are there show it; what is not there
// is listed, not refused, with two exceptions, without which there are no shapes to plan: a model
// of `init_from` that `init_from.model` does not describe (CKPT-NONE, 65), and a
// tokenizer that alone knows the size of a new model's vocabulary.
StatusOr<DryRunSheet> DryRun(const PipelineConfig& config, int ranks);

// Parameters by what they are for; the layers' norms with the final one.
std::vector<ParameterCount> ParametersByKind(const model::ModelConfig& config,
                                             const std::vector<model::ParameterSpec>& specs);

}  // namespace sala::recipes
