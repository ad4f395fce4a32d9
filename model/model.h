// The model: embedding, layers of mixer + MLP, final norm, head. One class serves the
// full-attention teacher and the hybrid; the configuration says which layer has which mixer.
//
//   ParameterStore params(ParameterSpecs(config));
//   Model model(config, params);
//   ArenaScope scope(arena);
//   ForwardState state = model.Forward(ctx, arena, batch, options);           // state.hidden [T,
//   H]
//   ... a loss writes dhidden and the head's gradient ...
//   model.Backward(ctx, arena, batch, options, state, dhidden, gradients);    // gradients
//   accumulate
//
// Gradients of parameters accumulate, gradients of activations overwrite, except the residual
// stream's, which accumulates. Everything is computed on packed tokens [T, ...]; nothing crosses
// the documents of the batch. With several ranks on the same samples (model/spread.h) T is this
// rank's range of the tokens and "part" the part of it whose residual stream the rank keeps.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/context.h"
#include "kernels/common/documents.h"
#include "model/config.h"
#include "model/parameters.h"
#include "model/spread.h"

namespace sala::model {

// Views of the tensors of one mixer: parameters, or (in Gradients) their gradients. Empty where the
// configuration has none, or where a gradient is not wanted (frozen).
struct MixerTensors {
  Tensor q_proj, k_proj, v_proj, o_proj;
  Tensor gate;            // o_gate of softmax, z_proj of linear layers
  Tensor q_norm, k_norm;  // [D]
  Tensor o_norm;          // [N * D], linear layers
};

struct LayerTensors {
  Tensor input_norm, post_norm;
  MixerTensors mixer;
  Tensor gate_proj, up_proj, down_proj;
};

struct ModelTensors {
  Tensor embedding;
  std::vector<LayerTensors> layers;
  Tensor norm;
  Tensor head;  // the embedding when tied
  // Of the store they are views of (model/units.h): whoever uses a unit's tensors says so.
  UnitHooks* hooks = nullptr;
  void Enter(int64_t unit) const {
    if (hooks != nullptr) hooks->Enter(unit);
  }
  void Leave(int64_t unit) const {
    if (hooks != nullptr) hooks->Leave(unit);
  }
};

// Views into a store laid out by ParameterSpecs(config). `wanted` (by tensor name) leaves views
// empty: frozen parameters.
ModelTensors BindTensors(const ModelConfig& config, ParameterStore& store,
                         const std::function<bool(const ParameterSpec&)>& wanted = nullptr);
MixerTensors BindMixer(const ModelConfig& config, int64_t layer, MixerType type,
                       ParameterStore& store,
                       const std::function<bool(const ParameterSpec&)>& wanted = nullptr);

// Packed tokens of one micro-batch. The vectors own the data the views below refer to.
struct Batch {
  std::vector<int32_t> tokens;      // [T]
  std::vector<int32_t> labels;      // [T], -1: no target
  std::vector<int32_t> positions;   // [T], from 0 in each document
  std::vector<int32_t> cu_seqlens;  // [S + 1]

  int64_t size() const { return static_cast<int64_t>(tokens.size()); }
  int64_t targets() const;
  ConstTensor tokens_view() const { return {tokens.data(), {size()}}; }
  ConstTensor labels_view() const { return {labels.data(), {size()}}; }
  ConstTensor positions_view() const { return {positions.data(), {size()}}; }
};

// The values where the context's device reads them: themselves on a CPU, a copy in the arena on a
// GPU.
ConstTensor ToDevice(const Context& ctx, Arena& arena, std::span<const int32_t> values);

// One document without labels (generation, scoring).
Batch SingleDocument(const std::vector<int32_t>& tokens);

struct RunOptions {
  bool sparse_attention =
      false;  // documents of sparse_config.dense_len tokens and more use block selection
  bool recompute =
      true;  // keep only each layer's input and run the layer again in the backward pass
  double logit_scale_base = 0;  // HyPE's a (inference only); 0: off
};

// Tables every layer shares, made once per batch: of the tokens [share.begin, share.end) that this
// rank computes, T of them.
struct BatchTables {
  TokenShare share;
  ConstTensor tokens, labels, positions;  // i32 [T]
  Tensor attention_cos, attention_sin;    // empty without rotary embedding
  Tensor lightning_cos, lightning_sin;
  // Documents with tokens here, whole, in token numbers of the batch.
  std::vector<kernels::DocumentRange> dense_documents, sparse_documents;
  // The pieces of documents that lie here, from 0; whether the first began before, the last goes
  // on.
  std::vector<int32_t> cu_seqlens;
  bool carried_in = false, carried_out = false;
  std::vector<char> survives;  // [cp], Spread::EnteringState
};

BatchTables MakeBatchTables(const Context& ctx, Arena& arena, const ModelConfig& config,
                            const Spread& spread, const Batch& batch, const RunOptions& options);

// What the forward pass of a mixer keeps for its backward pass; all in the arena.
struct MixerState {
  ConstTensor x;              // [T, H], the normalised input, of all tokens of the range
  Tensor projected;           // [T, all outputs of q, k, v and gate]; the next are columns of it
  Tensor q_raw, k_raw, v, z;  // projections; z: gate logits
  Tensor q, k;                // after norm and rotation (the raw ones where there is neither)
  Tensor all_k, all_v;        // softmax layers: of all tokens of the batch, [*, K D]
  Tensor state_in;            // linear layers: what enters the first token; empty: nothing
  Tensor q_rstd, k_rstd;      // [T, N], [T, K]
  Tensor o, lse, blocks;      // attention output; lse and blocks in softmax layers
  Tensor o_rstd, u;           // output norm, what enters o_proj
};

struct LayerState {
  Tensor x;                          // [part, H] the layer's input, always kept
  Tensor n1, rstd1, mid, n2, rstd2;  // empty when the layer is recomputed
  Tensor n2_all;                     // n2 of all tokens of the range
  Tensor gate_up, gate, up, h;       // MLP; gate and up are columns of gate_up
  MixerState mixer;
};

struct ForwardState {
  std::vector<LayerState> layers;
  BatchTables tables;
  Tensor last;    // [part, H] residual stream after the last layer
  Tensor rstd;    // [part]
  Tensor hidden;  // [part, H] after the final norm; what the head reads
};

// Keys, values and recurrent state of one sequence, for generation.
struct LayerCache {
  std::vector<float> k, v;   // softmax: [n, K, D] each
  std::vector<float> state;  // linear: [N, D, D]
};
struct Cache {
  int64_t length = 0;
  std::vector<LayerCache> layers;
};

// Called for each layer with the normalised input [T, H] of all tokens of the range and the mixer's
// output [part, H] before the residual factor.
using LayerHook =
    std::function<void(int64_t layer, const ConstTensor& normed, const ConstTensor& mixer_out)>;

class Model {
 public:
  // The store is laid out by ParameterSpecs(config, spread.shard()).
  Model(ModelConfig config, ParameterStore& store, const Spread& spread = {});

  const ModelConfig& config() const { return config_; }
  const Spread& spread() const { return spread_; }
  const ModelTensors& tensors() const { return tensors_; }
  // 1 / m: what multiplies hidden . head^T.
  float logit_scale() const { return static_cast<float>(1.0 / config_.width_multiplier()); }

  // The same model with layer `layer` replaced by another mixer (HALO's M(i)); shares all other
  // tensors.
  Model WithMixer(int64_t layer, MixerType type, const MixerTensors& mixer) const;

  // State lives in the arena until the caller's scope ends.
  ForwardState Forward(const Context& ctx, Arena& arena, const Batch& batch,
                       const RunOptions& options) const;

  // dhidden [part, H]: gradient of state.hidden. `gradients` has the views of BindTensors; empty
  // views are frozen.
  void Backward(const Context& ctx, Arena& arena, const Batch& batch, const RunOptions& options,
                const ForwardState& state, const ConstTensor& dhidden,
                const ModelTensors& gradients) const;

  // Forward without state, layer by layer from `first_layer` on the residual stream x [part, H] (in
  // place); an empty x and first_layer = 0 start from the embedding. Returns the hidden states
  // after the final norm. Memory of one layer at a time.
  Tensor ForwardOnly(
      const Context& ctx, Arena& arena, const Batch& batch, const RunOptions& options,
      int64_t first_layer = 0, Tensor x = {}, const LayerHook& hook = nullptr,
      const std::function<void(int64_t layer, const ConstTensor& x)>& on_input = nullptr) const;

  // Layers [first_layer, end_layer) on the residual stream x [part, H], in place.
  void RunLayers(const Context& ctx, Arena& arena, const Batch& batch, const RunOptions& options,
                 int64_t first_layer, int64_t end_layer, const Tensor& x) const;

  // hidden [T, H], after the final norm, on one rank and a CPU -> [T, V].
  std::vector<float> Logits(const Context& ctx, const ConstTensor& hidden) const;

  // Runs a prompt (one document) and fills the cache; returns the logits [V] of the last token.
  std::vector<float> Prefill(const Context& ctx, Arena& arena, const std::vector<int32_t>& tokens,
                             const RunOptions& options, Cache* cache) const;
  // One more token; returns the logits [V] after it.
  std::vector<float> Decode(const Context& ctx, Arena& arena, int32_t token,
                            const RunOptions& options, Cache* cache) const;

 private:
  // The input of the first layer.
  Tensor Embed(const Context& ctx, Arena& arena, const BatchTables& tables) const;
  void LayerForward(const Context& ctx, Arena& arena, const BatchTables& tables,
                    const RunOptions& options, int64_t layer, LayerState& state,
                    const Tensor& out) const;
  void LayerBackward(const Context& ctx, Arena& arena, const BatchTables& tables, int64_t layer,
                     const LayerState& state, const LayerTensors& gradients,
                     const Tensor& dx) const;
  void MlpForward(const Context& ctx, Arena& arena, int64_t layer, const Tensor& x) const;

  ModelConfig config_;
  Spread spread_;
  ModelTensors tensors_;
};

}  // namespace sala::model
