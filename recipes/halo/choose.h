// Which layers of the teacher keep softmax attention, by the stage's selector. Scores are written
// to RUN/halo/scores.json behind every layer and taken from there when teacher, mixers and items
// are still the same bits; the choice is written to RUN/halo/selection.json.
#pragma once

#include <cstdint>
#include <vector>

#include "model/model.h"
#include "nlohmann/json.hpp"
#include "recipes/checkpointing.h"
#include "recipes/halo/settings.h"
#include "recipes/session.h"

namespace sala::recipes {

// Held by reference: all of it must outlive the call.
struct ChoiceInput {
  Session& session;
  const StageConfig& stage;
  const HaloPlan& plan;
  const LoadedModel& teacher;
  const model::Model& teacher_model;
  model::ParameterStore& mixers;  // aligned, of all layers
};

struct LayerChoice {
  std::vector<int64_t> layers;  // rising
  nlohmann::json scores;        // what checkpoints and selection.json say of them; null: not scored
};

// Collective, the same on all ranks. STOPPED (75) when asked to stop between two layers: the scores
// so far are kept. NUM-NONFINITE (76) for a mixer that has diverged.
StatusOr<LayerChoice> ChooseLayers(const ChoiceInput& input);

}  // namespace sala::recipes
