// HALO step 1: every layer's linear mixer learns to give what the teacher's attention gives on the
// same input (docs/math/halo.md 2).
//
// The teacher runs layer by layer and its own outputs go on, so layers are independent: student
// forward, loss, student backward without input gradient, and all activations of the layer are
// dropped before the next one. Peak memory is that of one layer.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "data/stream.h"
#include "recipes/step_loop.h"

namespace sala::recipes {

class AlignTask : public StepTask {
 public:
  // `mixers` is laid out by AllMixerSpecs and trained; the teacher is only read. `held_out` may be
  // null or empty. All must outlive the task. AlignLoss::kL2Norm on a CPU only.
  AlignTask(const Context& ctx, parallel::Mesh& mesh, const model::Model& teacher,
            model::ParameterStore& mixers, AlignLoss loss, const data::ValidationSet* held_out);

  const model::ModelConfig& config() const override { return config_; }
  model::ComputeParameters& parameters() override { return mixers_; }

  // loss = 1/L sum over layers of the mean over tokens (and features) of the batch.
  Status MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                    const StepCounts& counts, model::ParameterStore& gradients,
                    std::span<double> sums) override;
  std::vector<std::string> SumNames() const override;
  // "loss", "relative_error" (mean of the layers), then "relative_error_I": squared error /
  // variance of the target.
  std::vector<std::pair<std::string, double>> Values(std::span<const double> sums,
                                                     const StepCounts& counts) const override;
  StatusOr<std::vector<std::pair<std::string, double>>> Validate(Session& session) override;

  // Values() of all held-out batches given, without gradients; collective over the mesh, to
  // whose dp ranks the batches are dealt: batch i lies on rank i mod DP.
  StatusOr<std::vector<std::pair<std::string, double>>> Evaluate(
      const Context& ctx, Arena& arena, const std::vector<model::Batch>& batches);

  // Relative error per layer of the first and the last Validate; empty before.
  const std::vector<double>& first_errors() const { return first_errors_; }
  const std::vector<double>& last_errors() const { return last_errors_; }

 private:
  // One pass over the teacher's layers. `gradients` empty: losses only. The gradient is that of the
  // loss of a batch of `tokens` tokens.
  void Pass(const Context& ctx, Arena& arena, const model::Batch& batch, double tokens,
            const std::vector<model::MixerTensors>& gradients, model::UnitHooks* gradient_hooks,
            std::span<double> sums) const;
  // Adds the layer's sums and, unless dy is empty, writes the gradient of y.
  void LayerLoss(const Context& ctx, const ConstTensor& y, const ConstTensor& target, double tokens,
                 const Tensor& dy, std::span<double> layer_sums) const;

  parallel::Mesh& mesh_;
  const model::Model& teacher_;
  model::ModelConfig config_;
  mutable model::ComputeParameters mixers_;  // what is gathered when is no part of a task's state
  std::vector<model::MixerTensors> weights_;
  AlignLoss loss_;
  const data::ValidationSet* held_out_;
  std::vector<double> first_errors_, last_errors_;
};

}  // namespace sala::recipes
