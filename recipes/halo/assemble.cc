#include "recipes/halo/assemble.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

namespace sala::recipes {
namespace {

using model::MixerType;
using model::ParameterSpec;
using model::ParameterStore;

constexpr double kGateDeviation = 0.02;

void CopyTensor(const ParameterStore& from, const ParameterSpec& spec, ParameterStore& to) {
  std::memcpy(to.Get(spec.name).raw(), from.Get(spec.name).raw(),
              static_cast<size_t>(spec.numel) * sizeof(float));
}

bool IsMixerTensor(const std::string& name) {
  return name.find(".self_attn.") != std::string::npos;
}

std::string MixerPrefix(int64_t layer) {
  return "model.layers." + std::to_string(layer) + ".self_attn.";
}

}  // namespace

Hybrid AssembleHybrid(const model::ModelConfig& teacher_config, const ParameterStore& teacher,
                      const ParameterStore& mixers, const std::vector<int64_t>& softmax_layers,
                      const model::TensorShard& shard) {
  Hybrid hybrid;
  hybrid.config = teacher_config;
  for (int64_t layer = 0; layer < teacher_config.num_hidden_layers; ++layer) {
    const bool softmax =
        std::find(softmax_layers.begin(), softmax_layers.end(), layer) != softmax_layers.end();
    hybrid.config.mixer_types[static_cast<size_t>(layer)] =
        NameOf(softmax ? MixerType::kSoftmax : MixerType::kLightning);
  }
  hybrid.params = ParameterStore(model::ParameterSpecs(hybrid.config, shard));
  for (int64_t layer = 0; layer < teacher_config.num_hidden_layers; ++layer) {
    const MixerType type = hybrid.config.mixer(layer);
    for (const ParameterSpec& spec : model::MixerSpecs(hybrid.config, layer, type)) {
      CopyTensor(type == MixerType::kSoftmax ? teacher : mixers, hybrid.params.Spec(spec.name),
                 hybrid.params);
    }
  }
  for (const ParameterSpec& spec : hybrid.params.specs()) {
    if (!IsMixerTensor(spec.name)) CopyTensor(teacher, spec, hybrid.params);
  }
  return hybrid;
}

Hybrid EnterHype(Hybrid hybrid, const HypeOptions& options) {
  if (options.remove_rope) hybrid.config.attn_use_rope = false;
  if (!options.add_gate || hybrid.config.attn_use_output_gate) return hybrid;

  Hybrid gated;
  gated.config = hybrid.config;
  gated.config.attn_use_output_gate = true;
  gated.params = ParameterStore(model::ParameterSpecs(gated.config, options.shard));
  for (const ParameterSpec& spec : hybrid.params.specs())
    CopyTensor(hybrid.params, spec, gated.params);
  for (int64_t layer = 0; layer < gated.config.num_hidden_layers; ++layer) {
    if (gated.config.mixer(layer) != MixerType::kSoftmax) continue;
    const std::string gate = MixerPrefix(layer) + "o_gate.weight";
    if (options.gate_init == GateInit::kSmallNormal) {
      model::InitialiseNormal(options.seed, kGateDeviation, gated.params, gate);
      continue;
    }
    const Tensor o_proj = gated.params.Get(MixerPrefix(layer) + "o_proj.weight");
    auto* weight = o_proj.Data<float>();
    for (int64_t i = 0; i < o_proj.numel(); ++i) weight[i] *= 2.0F;
  }
  return gated;
}

}  // namespace sala::recipes
