// What the configuration and the teacher together decide before anything runs, and the
// contradictions that are refused.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "model/config.h"
#include "recipes/config.h"

namespace sala::recipes {

struct HaloPlan {
  int64_t softmax_layers = 0;            // how many layers keep softmax attention
  std::vector<int64_t> forced;           // of them, by decision (halo.keep), sorted
  std::vector<int64_t> explicit_layers;  // selector explicit: those it names, sorted
  bool layer_0_may_be_linear = false;
};

// CFG-HALO (78), naming the keys. `stage.halo` is present.
StatusOr<HaloPlan> PlanHalo(const StageConfig& stage, const model::ModelConfig& teacher);

// Settings that are allowed but known to give a bad result, or one of less use than may be thought.
std::vector<std::string> HaloWarnings(const HaloConfig& halo, const HaloPlan& plan,
                                      const model::ModelConfig& teacher);

}  // namespace sala::recipes
