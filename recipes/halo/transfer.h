// HALO step 0: linear mixers made from the teacher's attention weights (docs/math/halo.md 1; arXiv
// 2601.22156 section 3).
//
// The store holds one Lightning mixer for every layer, named as in the exported hybrid
// ("model.layers.I.self_attn.q_proj.weight", ...), so a student is assembled by picking tensors.
#pragma once

#include <cstdint>
#include <vector>

#include "core/status.h"
#include "model/config.h"
#include "model/parameters.h"

namespace sala::recipes {

// CFG-HALO (78) when linear mixers cannot be made for this teacher: not all layers softmax, or,
// where its weights are transferred, linear heads of another number or size than its query heads.
Status CheckTeacher(const model::ModelConfig& teacher, bool from_teacher);

// The teacher's configuration with every layer linear: the one the mixers are trained and saved
// under.
model::ModelConfig AllLinear(const model::ModelConfig& teacher);

// Tensors of the Lightning mixers of all layers, laid out.
std::vector<model::ParameterSpec> AllMixerSpecs(const model::ModelConfig& config,
                                                const model::TensorShard& shard = {});

struct TransferOptions {
  int64_t seed = 0;
  bool from_teacher = true;  // false: q, k, v, o from random normal draws (an ablation)
};

// q, o copied; head i of k, v from the teacher's head floor(i / (heads / kv_heads)); q/k gains
// copied where the teacher has them, else ones; output norm ones; gate uniform in +-1/sqrt(hidden).
// Random numbers depend on (seed, tensor name) only. `teacher` is this tensor rank's part, whole in
// memory, and so is the result.
model::ParameterStore TransferMixers(const model::ModelConfig& teacher_config,
                                     const model::ParameterStore& teacher,
                                     const TransferOptions& options,
                                     const model::TensorShard& shard = {});

}  // namespace sala::recipes
