// AdamW over the flat parameter buffer, its state split over the ranks that hold the same
// parameters (ZeRO-1 and up), with muP multipliers, clipping by the global norm and the rule for
// non-finite gradients.
//
// On a CPU the float32 parameters are their own masters. On a GPU the masters are float32 on the
// device, in the optimizer; the model computes with their bfloat16 roundings. The parameter store
// in host memory then is brought up to date when a checkpoint is written and when training ends.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/checkpoint.h"
#include "core/context.h"
#include "model/parameters.h"
#include "parallel/mesh.h"
#include "recipes/config.h"
#include "recipes/gradient_reducer.h"

namespace sala::recipes {

struct UpdateResult {
  double grad_norm = 0;  // of the global gradient, before clipping
  bool clipped = false;
  bool skipped = false;  // loss or gradient not finite: parameters and moments unchanged
};

class Optimizer {
 public:
  // `trainable` decides per tensor; frozen tensors keep their bits. Parameters, mesh and reducer
  // must outlive the optimizer.
  Optimizer(const Context& ctx, const OptimizerConfig& config, const model::ModelConfig& model,
            model::ComputeParameters& params,
            const std::function<bool(const model::ParameterSpec&)>& trainable, parallel::Mesh& mesh,
            GradientReducer& reducer);

  // From the step's gradient, which the reducer sums here: clips, updates this rank's part, and
  // has the parameters gathered beside what follows (ComputeParameters::Settle). `loss_finite` must
  // be the same on all ranks.
  StatusOr<UpdateResult> Update(const Context& ctx, double learning_rate, bool loss_finite);

  int64_t updates() const { return updates_; }
  void set_updates(int64_t updates) { updates_ = updates; }

  // Slices of the parameters and moments this rank owns (kinds param, exp_avg, exp_avg_sq), named
  // after the parameters.
  void AppendSlices(std::vector<TensorSlice>* slices) const;
  Status Load(const Context& ctx, const Checkpoint& checkpoint);

  // Masters start from the host's store again, after it was filled.
  void TakeParameters(const Context& ctx);
  // The host's store gets this rank's shard of the masters, and the slices above the moments.
  void ReadShard(const Context& ctx);
  // The host's store, which must be whole, gets all masters, on every rank. Collective.
  Status ReadAll(const Context& ctx);

  size_t bytes() const { return exp_avg_.bytes() + exp_avg_sq_.bytes() + master_.bytes(); }

 private:
  bool split() const { return mesh_.zero_stage() >= 1; }
  // Elements [begin, end) of the flat buffer, inside a piece this rank has, in a buffer below.
  Tensor Range(const Buffer& buffer, int64_t begin, int64_t end) const;
  StatusOr<double> SumOfSquares(const Context& ctx);

  // The part of one tensor that lies in one of this rank's pieces.
  struct Segment {
    const model::ParameterSpec* spec;
    int64_t begin, end;  // in the flat buffer
    bool trained;
    double lr_multiplier, weight_decay;
  };

  OptimizerConfig config_;
  model::ComputeParameters& params_;
  parallel::Mesh& mesh_;
  GradientReducer& reducer_;
  std::vector<Segment> segments_;  // in order
  // f32, this rank's pieces one behind the other, on the context's device; masters on a GPU only.
  Buffer exp_avg_, exp_avg_sq_, master_;
  std::vector<float> saved_avg_, saved_avg_sq_;  // of a GPU, for AppendSlices
  int64_t updates_ = 0;
};

// lr and weight decay multipliers of one tensor (training.md, muP rules).
double LearningRateMultiplier(const OptimizerConfig& config, const model::ModelConfig& model,
                              const model::ParameterSpec& spec);
double WeightDecay(const OptimizerConfig& config, const model::ParameterSpec& spec);

}  // namespace sala::recipes
