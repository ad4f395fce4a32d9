// What the pipeline calls for a stage, and what it shows at the end.
#pragma once

#include <string>
#include <vector>

#include "data/stream.h"
#include "model/loss.h"
#include "recipes/checkpointing.h"
#include "recipes/session.h"

namespace sala::recipes {

// One row of the table at the end of a run (summary.json in the run directory).
struct StageSummary {
  std::string stage;
  int64_t tokens = 0;
  double seconds = 0;
  double loss_before = 0;  // held-out loss per target before and after (training loss where there
                           // is no held-out data)
  double loss_after = 0;
  std::string note;
};

struct StageInput {
  const StageConfig* config = nullptr;
  int64_t index = 0;  // in the pipeline
  int64_t stages = 1;
  std::string
      init_path;  // checkpoint directory or exported folder to start from; "": random weights
  bool carry_optimizer = false;
  const Checkpoint* resume = nullptr;  // a checkpoint of this stage that is not its final one
};

// base, stable, short decay, long decay, SFT: next-token cross entropy over the stage's data.
StatusOr<StageSummary> RunPretrainStage(Session& session, const StageInput& input);

// HALO conversion: transfer, align, score, select, distil, assemble [, finetune] [, logit-scale
// fit]. recipes/halo/.
StatusOr<StageSummary> RunHaloStage(Session& session, const StageInput& input);

// TOK-VOCAB, TOK-MISMATCH (65): the tokenizer must be the one the weights were trained with, and
// every id must have a row in the embedding.
Status CheckModel(Session& session, const LoadedModel& loaded);
Status CheckVocabulary(const data::Tokenizer& tokenizer, const model::ModelConfig& model);

// The row of a phase that is the whole stage: held-out losses where they were measured, training
// losses otherwise.
struct StepLoopSummary;
StageSummary SummaryRow(const std::string& stage, const StepLoopSummary& done);

// Held-out loss of a model over a validation set, split over the data-parallel ranks. Collective.
struct ValidationResult {
  double loss = 0;      // nats per target
  double accuracy = 0;  // share of targets where the arg-max is right
  int64_t targets = 0;
};
StatusOr<ValidationResult> EvaluateValidation(Session& session, const model::Model& model,
                                              const data::ValidationSet& set,
                                              const model::RunOptions& options);

// What can be known before step one: datasets, tokenizer, epochs, loss masks, recall prompts of a
// stage. Reads little and trains nothing, so that a mistake in the last stage does not show after
// hours. Every rank checks the same. What is opened is let go of and opened again by the stage: to
// keep it would hold the document lists of all stages in memory for the whole run.
Status CheckPretrainInputs(const StageConfig& stage, const data::Tokenizer& tokenizer, int ranks);
Status CheckHaloInputs(const StageConfig& stage, const data::Tokenizer& tokenizer,
                       DeviceKind device, int ranks);
// The one of the two that the stage's kind asks for.
inline Status CheckStageInputs(const StageConfig& stage, const data::Tokenizer& tokenizer,
                               DeviceKind device, int ranks) {
  return stage.kind == StageKind::kHalo ? CheckHaloInputs(stage, tokenizer, device, ranks)
                                        : CheckPretrainInputs(stage, tokenizer, ranks);
}

// Runs the whole pipeline (or the single stage) with resume, prints the table.
Status RunPipeline(parallel::Communicator& world, const PipelineConfig& config);

}  // namespace sala::recipes
