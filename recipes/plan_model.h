// The passes of model/model.h with sizes instead of tensors. Not part of the room's interface.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/common/documents.h"
#include "model/config.h"
#include "model/spread.h"
#include "recipes/plan_pass.h"
#include "recipes/plan_scratch.h"

namespace sala::recipes {

// BatchTables (model/model.h).
struct Tables {
  model::TokenShare share;
  std::vector<kernels::DocumentRange> dense, sparse;
  bool attention_rope = false, lightning_rope = false;
};

// Each method allocates and exchanges as the one of that name in model/; what a caller keeps stays
// allocated.
class ModelPass {
 public:
  // `enter` is told of units.
  ModelPass(PassContext& ctx, const model::ModelConfig& config, bool sparse,
            const std::function<void(int64_t)>& enter);

  const model::TokenShare& share() const { return share_; }
  int64_t hidden() const { return config_.hidden_size; }
  int64_t layers() const { return config_.num_hidden_layers; }
  bool summed() const { return ctx_.tp_ranks > 1; }

  void Activations(int64_t rows, int64_t width) { ctx_.arena.New(rows * width * ctx_.element); }
  void Floats(int64_t n) { ctx_.arena.New(n * kFloat); }

  Tables MakeTables(const std::vector<int32_t>& cu_seqlens);

  // Spread::Gather.
  void Gather(int64_t width);
  // Spread::Sum.
  void Sum(int64_t width, kernels::Write write);
  void RowParallel(int64_t in, kernels::Write write);
  void Embed();
  void LayerForward(const Tables& tables, int64_t layer);
  void LayerBackward(const Tables& tables, int64_t layer);
  void MixerForward(const Tables& tables, model::MixerType type, kernels::Write write);
  void MixerBackward(const Tables& tables, model::MixerType type);

  // Model::Forward.
  Tables Forward(const std::vector<int32_t>& cu_seqlens, bool recompute);
  void Backward(const Tables& tables, bool recompute, bool embedding_trained);

  // Model::ForwardOnly; `hook` behind each layer, before its memory is given back. With
  // `input_given` from a copy of what enters the first layer, which stays allocated.
  void ForwardOnly(const std::vector<int32_t>& cu_seqlens,
                   const std::function<void(int64_t)>& hook = nullptr, bool input_given = false);
  void EnterHead();

  // Entries of the vocabulary that this rank has, without padding.
  int64_t Vocabulary() const;

 private:
  Heads HeadsOf(model::MixerType type) const;
  // Work space of y = x W^T, and of its gradients unless the pass goes forward only.
  void Products(int64_t tokens, int64_t out, int64_t in, bool trained);
  bool Trained(model::MixerType type) const;
  bool HasNorm(model::MixerType type) const;
  bool HasGate(model::MixerType type) const;
  bool HasOutputNorm(model::MixerType type) const;
  // Queries and keys are used as they are projected.
  bool Raw(const Tables& tables, model::MixerType type) const;
  int64_t ProjectedWidth(model::MixerType type) const;
  void OutputNorm(model::MixerType type, bool backward, const Heads& g);
  // Spread::GatherContext and SumContext.
  void GatherContext(int64_t width);
  void SumContext(int64_t width);
  void SoftmaxForward(const Tables& tables, const Heads& g);
  void SoftmaxBackward(const Tables& tables, const Heads& g);
  // Spread::EnteringState.
  void EnteringState(const Heads& g, bool backwards);
  void LinearForward(const Heads& g);
  void LinearBackward(const Heads& g);

  static constexpr int64_t kDenseBlock = 64;

  PassContext& ctx_;
  const model::ModelConfig& config_;
  bool sparse_;
  bool forward_only_ = false;
  const std::function<void(int64_t)>& enter_;
  model::TokenShare share_;
};

}  // namespace sala::recipes
