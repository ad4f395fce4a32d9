// What models are measured on: the items layers are scored on (held-out text, and recall prompts
// made for the run's tokenizer), and samples of the stage's text.
#pragma once

#include <vector>

#include "core/status.h"
#include "data/tokenizer.h"
#include "parallel/mesh.h"
#include "recipes/config.h"
#include "recipes/halo/score.h"

namespace sala::recipes {

// A prompt with its answer as one document; labels only where an answer token is to be predicted.
model::Batch RecallBatch(const std::vector<int32_t>& prompt, const std::vector<int32_t>& answer);

// halo.score.text_tokens of held-out text in pieces of the alignment length, and
// halo.score.recall_items prompts, even ones passkey, odd ones multi-key needle. The same on every
// rank.
StatusOr<ScoreItems> MakeScoreItems(const StageConfig& stage, const data::Tokenizer& tokenizer);

// This rank's share of the first samples of the distillation, some 16 thousand tokens in all, a
// batch each: what the student's activations are measured on. Dealt as HeldOutBatches deals.
StatusOr<std::vector<model::Batch>> CalibrationBatches(const StageConfig& stage,
                                                       const data::Tokenizer& tokenizer,
                                                       const parallel::Mesh& mesh);

// The prompts alone: EVAL-LENGTH, EVAL-BOUNDARY (78) where the tokenizer cannot make them. They
// need no data.
StatusOr<std::vector<model::Batch>> MakeRecallPrompts(const StageConfig& stage,
                                                      const data::Tokenizer& tokenizer);
// Their errors, for a stage that scores layers; OK for all others.
Status CheckRecallPrompts(const StageConfig& stage, const data::Tokenizer& tokenizer);

}  // namespace sala::recipes
