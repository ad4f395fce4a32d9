// Evaluations of a run: before and after its stages, with their gates (docs/evaluation.md).
#pragma once

#include <string>

#include "core/status.h"
#include "recipes/config.h"
#include "recipes/session.h"

namespace sala::recipes {

enum class EvalMoment : uint8_t { kBefore, kAfter };

// RUN/eval/STEP-MOMENT-STAGE of the model at `model_path`, a checkpoint or a folder; nothing where
// the stage does not ask for it, or where the evaluation is complete already. The stage's layout of
// ranks is used. Parameters, arenas and random streams are its own: training is not touched.
// Collective. STOPPED (75) when the run is asked to stop between two tasks.
Status EvaluateStage(Session& session, const StageConfig& stage, EvalMoment moment,
                     const std::string& model_path);

// EVAL-GATE (76) with the figures when a gate of the stage does not hold after it; logged only when
// the run ignores gates. `model_path`: the stage's result; evaluations of later steps do not count.
// Collective.
Status CheckStageGates(Session& session, const StageConfig& stage, const std::string& model_path);

// What can be known before step one: tasks, haystack, lengths, tokenizer. Every rank checks the
// same.
Status CheckEvalInputs(const StageConfig& stage, const data::Tokenizer& tokenizer);

}  // namespace sala::recipes
