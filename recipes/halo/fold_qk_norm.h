// The query/key norm of softmax layers folded into their projections (docs/math/halo.md 5): the
// exported hybrid has no place for it.
//
//   q_h(t) = RMSNorm(x_t Wq_h) * g = x_t Wq_h * g / rms_h(t),   rms = sqrt(mean square + eps)
//
// Wq_h <- c_h diag(g) Wq_h, the same for keys. The rotation comes after the norm and turns whole
// heads, so it does not see the change. A token's query is then off by the factor c_h rms_h(t);
// c_h = sum rms / sum rms^2 over tokens makes sum (c_h rms_h(t) - 1)^2 least. Exact where rms_h is
// the same for every token.
#pragma once

#include <cstdint>
#include <vector>

#include "core/context.h"
#include "model/model.h"
#include "nlohmann/json.hpp"
#include "parallel/mesh.h"
#include "recipes/halo/assemble.h"

namespace sala::recipes {

// c of one layer's heads, of the whole model; both empty for a linear layer.
struct QkScales {
  std::vector<double> q;  // [num_attention_heads]
  std::vector<double> k;  // [num_key_value_heads]
};

nlohmann::json ToJson(const std::vector<QkScales>& scales);
// Of this model's softmax layers; CKPT-MANIFEST (65) naming `where` when it is of another form.
StatusOr<std::vector<QkScales>> QkScalesFromJson(const nlohmann::json& json,
                                                 const model::ModelConfig& config,
                                                 const std::string& where);

// Of the tokens of `batches`, which are dealt to the dp ranks of the mesh as held-out ones are
// (HeldOutBatches); added in float64 in the order of the items, so that any number of dp ranks has
// the same bits. `model` has attn_qk_norm. Collective. NUM-NONFINITE (76) when a factor is not a
// finite number.
StatusOr<std::vector<QkScales>> MeasureQkScales(const Context& ctx, Arena& arena,
                                                const model::Model& model,
                                                const std::vector<model::Batch>& batches,
                                                const parallel::Mesh& mesh);

// The hybrid without attn_qk_norm: rows of q_proj and k_proj times gain and factor. Each product is
// rounded once. `scales` has one entry a layer.
Hybrid FoldQkNorm(Hybrid hybrid, const std::vector<QkScales>& scales,
                  const model::TensorShard& shard = {});

}  // namespace sala::recipes
