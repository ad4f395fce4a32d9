// The two mixers: softmax attention (dense or InfLLM-V2 sparse per document) and Lightning linear
// attention.
//   y = residual_factor * Mixer(x) [+ y]
#pragma once

#include "model/model.h"

namespace sala::model {

struct MixerOutput {
  Tensor y;            // [part, H]
  float alpha = 1.0F;  // factor on the mixer's output
  kernels::Write write = kernels::Write::kOverwrite;
};

// x [T, H] (all tokens of the range) is kept by reference in the state. `cache`, when given,
// receives keys and values or the final state of the batch's single document.
MixerState MixerForward(const Context& ctx, Arena& arena, const ModelConfig& config,
                        const Spread& spread, MixerType type, const MixerTensors& weights,
                        const BatchTables& tables, const RunOptions& options, const ConstTensor& x,
                        const MixerOutput& output, LayerCache* cache = nullptr);

// dy [T, H] is the gradient of y, of all tokens of the range (alpha is applied here). dx [T, H] is
// overwritten with this tensor rank's term of the input's gradient; empty: not wanted. Gradients of
// weights accumulate.
void MixerBackward(const Context& ctx, Arena& arena, const ModelConfig& config,
                   const Spread& spread, MixerType type, const MixerTensors& weights,
                   const BatchTables& tables, const MixerState& state, float alpha,
                   const ConstTensor& dy, const Tensor& dx, const MixerTensors& gradients);

// One token of generation, on one rank: x [1, H] -> y [1, H] accumulates alpha * output; the cache
// grows by the token.
void MixerDecode(const Context& ctx, Arena& arena, const ModelConfig& config, MixerType type,
                 const MixerTensors& weights, const BatchTables& tables, const RunOptions& options,
                 const ConstTensor& positions, const ConstTensor& x, const MixerOutput& output,
                 LayerCache* cache);

}  // namespace sala::model
