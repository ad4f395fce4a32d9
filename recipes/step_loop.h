// The training loop every phase shares: exact global batches, gradient accumulation, one update a
// step, metrics, validation, checkpoints, signals. What is trained and with which loss is a
// StepTask.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "data/stream.h"
#include "model/model.h"
#include "recipes/checkpointing.h"
#include "recipes/optimizer.h"
#include "recipes/session.h"

namespace sala::recipes {

// Of the whole global batch, equal on all ranks: what a sum is divided by.
struct StepCounts {
  int64_t targets = 0;  // labels >= 0
  int64_t tokens = 0;   // without padding
};

class StepTask {
 public:
  virtual ~StepTask() = default;

  virtual const model::ModelConfig& config() const = 0;            // saved with the parameters
  virtual model::ComputeParameters& parameters() = 0;              // trained
  model::ParameterStore& params() { return parameters().host(); }  // saved
  virtual bool Trainable(const model::ParameterSpec& spec) const { return true; }

  // Adds the gradients of this micro-batch to `gradients` (laid out as params(), float32 on the
  // context's device), already divided
  // by `counts`, and to `sums` one number per name of SumNames(). Sums are added over micro-batches
  // and all ranks, of those on the same samples too: each adds its part.
  virtual Status MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                            const StepCounts& counts, model::ParameterStore& gradients,
                            std::span<double> sums) = 0;
  virtual std::vector<std::string> SumNames() const = 0;

  // Named values of the step for logs and metrics, from the summed sums; the first is the loss.
  virtual std::vector<std::pair<std::string, double>> Values(std::span<const double> sums,
                                                             const StepCounts& counts) const = 0;

  // Useful floating-point operations of a step on one document (model/work.h); 0: not counted.
  virtual double WorkOf(int64_t document_tokens) const { return 0; }

  // Collective. Values of the held-out data, the first being the loss; empty: nothing to validate.
  virtual StatusOr<std::vector<std::pair<std::string, double>>> Validate(Session& session) {
    return std::vector<std::pair<std::string, double>>{};
  }
};

struct StepLoopConfig {
  StagePosition position;  // stage, index, phase; phase_step is the loop's
  std::string label;       // for the progress display: "stable 3/9"
  BatchConfig batch;
  ScheduleConfig schedule;
  OptimizerConfig optimizer;
  ValidationConfig validation;
  CheckpointConfig checkpoint;
  std::string config_yaml;
  nlohmann::json parent;
  nlohmann::json extra_trainer =
      nlohmann::json::object();  // stage state saved along ("halo": {...})
  bool final_phase = true;       // the last save of this loop is the stage's result
};

struct StepLoopSummary {
  int64_t steps = 0;
  int64_t tokens = 0;                                  // of the phase, over its whole life
  double seconds = 0;                                  // likewise
  double first_loss = 0, last_loss = 0;                // training loss of the first and last step
  double validation_before = 0, validation_after = 0;  // NaN where not measured
};

// Runs the phase from `resume` (a checkpoint of this very phase) or from its start, with `carry`
// giving moments to start from. Stops with STOPPED (exit 75) after a complete save when asked to.
StatusOr<StepLoopSummary> RunStepLoop(Session& session, const StepLoopConfig& config,
                                      StepTask& task, data::SampleStream& stream,
                                      const Checkpoint* resume, const Checkpoint* carry = nullptr);

// What a phase had done when this checkpoint was taken.
StepLoopSummary SummaryOf(const Checkpoint& checkpoint);

// STOPPED (exit 75), after the status file says so.
Status Stopped(Session& session, const std::string& stage);

// CFG-MESH (78) when the micro-batches of a step cannot be shared out over this mesh (dp resolved)
// as `rank_independent_sums` asks.
Status CheckShares(const BatchConfig& batch, const parallel::MeshConfig& mesh);

// Samples as one packed micro-batch, padding dropped; of none an empty one.
model::Batch MakeBatch(const std::vector<data::PackedSample>& samples);

// This rank's samples of a held-out set, a batch each: sample i is dealt to dp rank i mod DP. All
// ranks have equally many, the last one may be empty: ranks exchange while they evaluate.
StatusOr<std::vector<model::Batch>> HeldOutBatches(const data::ValidationSet& set,
                                                   const parallel::Mesh& mesh);

}  // namespace sala::recipes
