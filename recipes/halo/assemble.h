// Hybrids put together from the teacher and the aligned mixers, and the change to HyPE: softmax
// layers without rotary embedding and with an output gate (docs/math/halo.md 5).
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/parameters.h"
#include "recipes/config.h"

namespace sala::recipes {

struct Hybrid {
  model::ModelConfig config;
  model::ParameterStore params;
};

// `softmax_layers` keep the teacher's attention as it is, the others get their linear mixer;
// everything else is the teacher's. All stores are this tensor rank's part, whole in memory.
Hybrid AssembleHybrid(const model::ModelConfig& teacher_config,
                      const model::ParameterStore& teacher, const model::ParameterStore& mixers,
                      const std::vector<int64_t>& softmax_layers,
                      const model::TensorShard& shard = {});

struct HypeOptions {
  bool remove_rope = false;
  bool add_gate = false;
  GateInit gate_init = GateInit::kSmallNormal;
  int64_t seed = 0;
  model::TensorShard shard = {};
};

// kSmallNormal draws the gates N(0, 0.02^2), which about halves the layer's output (the published
// code's choice). kIdentity sets them to zero and doubles o_proj: sigmoid(0) = 1/2 and both factors
// are powers of two, so the output keeps its bits. What the hybrid already has stays as it is.
Hybrid EnterHype(Hybrid hybrid, const HypeOptions& options);

}  // namespace sala::recipes
