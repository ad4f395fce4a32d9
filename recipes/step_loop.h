// The training loop every phase shares: exact global batches, gradient accumulation, one update a
// step, metrics, validation, checkpoints, signals. What is trained and with which loss is a
// StepTask.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/model.h"
#include "recipes/checkpointing.h"
#include "recipes/optimizer.h"
#include "recipes/session.h"
#include "recipes/step_batch.h"
#include "recipes/step_progress.h"

namespace sala::recipes {

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

// Runs the phase from `resume` (a checkpoint of this very phase) or from its start, with `carry`
// giving moments to start from. Stops with STOPPED (exit 75) after a complete save when asked to.
StatusOr<StepLoopSummary> RunStepLoop(Session& session, const StepLoopConfig& config,
                                      StepTask& task, data::SampleStream& stream,
                                      const Checkpoint* resume, const Checkpoint* carry = nullptr);

// STOPPED (exit 75), after the status file says so.
Status Stopped(Session& session, const std::string& stage);

}  // namespace sala::recipes
