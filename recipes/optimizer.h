// AdamW over the flat parameter buffer, its state split over the data-parallel ranks (ZeRO-1), with
// muP multipliers, clipping by the global norm and the rule for non-finite gradients.
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

namespace sala::recipes {

struct UpdateResult {
  double grad_norm = 0;  // of the global gradient, before clipping
  bool clipped = false;
  bool skipped = false;  // loss or gradient not finite: parameters and moments unchanged
};

class Optimizer {
 public:
  // `trainable` decides per tensor; frozen tensors keep their bits. The parameters must outlive the
  // optimizer. `rank_independent`: the global norm is added from pieces whose borders do not depend
  // on the number of ranks.
  Optimizer(const Context& ctx, const OptimizerConfig& config, const model::ModelConfig& model,
            model::ComputeParameters& params,
            const std::function<bool(const model::ParameterSpec&)>& trainable,
            const parallel::Mesh& mesh, bool rank_independent = false);

  // Sums `gradients` (same layout as the store, destroyed) over the ranks, clips, updates this
  // rank's part, gathers the parameters. `loss_finite` must be the same on all ranks.
  StatusOr<UpdateResult> Update(const Context& ctx, model::ParameterStore& gradients,
                                double learning_rate, bool loss_finite);

  int64_t updates() const { return updates_; }
  void set_updates(int64_t updates) { updates_ = updates; }

  // Slices of the moments this rank owns (kinds exp_avg, exp_avg_sq), named after the parameters.
  void AppendSlices(std::vector<TensorSlice>* slices) const;
  Status Load(const Context& ctx, const Checkpoint& checkpoint);

  // Masters start from the host's store again, after it was filled.
  void TakeParameters(const Context& ctx);
  // The host's store gets this rank's shard of the masters, and the slices above the moments.
  void ReadShard(const Context& ctx);
  // The host's store gets all masters, on every rank. Collective.
  Status ReadAll(const Context& ctx);

  // This rank's shard of the flat buffer, whether or not the state is split.
  int64_t shard_begin() const { return partition_.begin[rank()]; }
  int64_t shard_end() const { return partition_.begin[rank() + 1]; }

 private:
  size_t rank() const { return static_cast<size_t>(mesh_.dp_rank()); }
  // Elements [begin, end) of the flat buffer in one of the buffers below.
  Tensor Range(const Buffer& buffer, int64_t begin, int64_t end) const;
  StatusOr<double> SumOfSquares(const Context& ctx, const Tensor& shard);

  // The part of one tensor that lies in this rank's range and is updated.
  struct Segment {
    const model::ParameterSpec* spec;
    int64_t begin, end;  // in the flat buffer
    double lr_multiplier, weight_decay;
  };

  OptimizerConfig config_;
  model::ComputeParameters& params_;
  const parallel::Mesh& mesh_;
  parallel::FlatPartition partition_;
  std::vector<int64_t> norm_borders_;  // of the pieces of the norm; a shard is some of them
  int64_t begin_ = 0;
  int64_t end_ = 0;
  std::vector<Segment> segments_;
  // f32 [end_ - begin_], on the context's device; masters on a GPU only.
  Buffer grad_, exp_avg_, exp_avg_sq_, master_;
  std::vector<float> saved_avg_, saved_avg_sq_;  // of a GPU, for AppendSlices
  int64_t updates_ = 0;
};

// lr and weight decay multipliers of one tensor (training.md, muP rules).
double LearningRateMultiplier(const OptimizerConfig& config, const model::ModelConfig& model,
                              const model::ParameterSpec& spec);
double WeightDecay(const OptimizerConfig& config, const model::ParameterSpec& spec);

}  // namespace sala::recipes
