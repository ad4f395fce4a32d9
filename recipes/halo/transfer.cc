#include "recipes/halo/transfer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/rng.h"

namespace sala::recipes {
namespace {

using model::MixerType;
using model::ModelConfig;
using model::ParameterSpec;
using model::ParameterStore;

Status HaloError(const std::string& text) { return MakeError(ExitCode::kConfig, "CFG-HALO", text); }

void Copy(const ConstTensor& from, const Tensor& to) {
  std::memcpy(to.raw(), from.raw(), static_cast<size_t>(from.numel()) * sizeof(float));
}

// from [K * D, H] -> to [N * D, H], the heads of this tensor rank: head i of `to` is head
// floor(i / (N / K)) of `from`.
void ExpandHeads(const ConstTensor& from, int64_t head_dim, const Tensor& to) {
  const int64_t heads = to.dim(0) / head_dim;
  const int64_t group = heads / (from.dim(0) / head_dim);
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t source = head / group;
    Copy(from.Rows(source * head_dim, (source + 1) * head_dim),
         to.Rows(head * head_dim, (head + 1) * head_dim));
  }
}

// Not the stream of a new model's weights: a teacher trained from the same seed has tensors of
// these names.
PhiloxStream StreamOf(int64_t seed, const ParameterSpec& spec) {
  return PhiloxStream("v1|" + std::to_string(seed) + "|halo||0|parameter|" + spec.name);
}

void InitialiseNormal(int64_t seed, const ParameterSpec& spec, double deviation,
                      ParameterStore& store) {
  PhiloxStream rng = StreamOf(seed, spec);
  model::FillTensor(store, spec, [&] { return deviation * rng.NextNormal(); });
}

// What common frameworks give a linear layer by default; the published code leaves the gate to it
// (docs/math/halo.md 1).
void InitialiseGate(int64_t seed, const ParameterSpec& spec, ParameterStore& store) {
  PhiloxStream rng = StreamOf(seed, spec);
  const double bound = 1.0 / std::sqrt(static_cast<double>(spec.shape[1]));
  model::FillTensor(store, spec, [&] { return bound * (2 * rng.NextDouble() - 1); });
}

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

Status CheckTeacher(const ModelConfig& teacher, bool from_teacher) {
  if (teacher.has_lightning()) {
    return HaloError(
        "the teacher already has linear layers (mixer_types); HALO converts a model whose layers "
        "are all softmax: "
        "name another model in init_from.path");
  }
  if (!from_teacher || (teacher.lightning_nh == teacher.num_attention_heads &&
                        teacher.lightning_head_dim == teacher.head_dim)) {
    return OkStatus();
  }
  const auto heads = [](int64_t n, int64_t d) {
    return std::to_string(n) + " x " + std::to_string(d);
  };
  return HaloError("the teacher's lightning_nh x lightning_head_dim is " +
                   heads(teacher.lightning_nh, teacher.lightning_head_dim) +
                   ", its num_attention_heads x head_dim " +
                   heads(teacher.num_attention_heads, teacher.head_dim) +
                   ": weights are transferred head by head; make them equal, or set "
                   "halo.align_from_teacher: false");
}

ModelConfig AllLinear(const ModelConfig& teacher) {
  ModelConfig config = teacher;
  config.mixer_types.assign(static_cast<size_t>(teacher.num_hidden_layers),
                            NameOf(MixerType::kLightning));
  return config;
}

std::vector<ParameterSpec> AllMixerSpecs(const ModelConfig& config,
                                         const model::TensorShard& shard) {
  std::vector<ParameterSpec> specs;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    for (ParameterSpec& spec : model::MixerSpecs(config, layer, MixerType::kLightning, shard))
      specs.push_back(std::move(spec));
  }
  model::LayOut(specs);
  return specs;
}

ParameterStore TransferMixers(const ModelConfig& teacher_config, const ParameterStore& teacher,
                              const TransferOptions& options, const model::TensorShard& shard) {
  ParameterStore mixers(AllMixerSpecs(teacher_config, shard));
  const double deviation =
      teacher_config.initializer_range / std::sqrt(teacher_config.width_multiplier());
  for (const ParameterSpec& spec : mixers.specs()) {
    const Tensor tensor = mixers.Get(spec.name);
    const bool gain = spec.kind == model::ParameterKind::kVector;
    if (EndsWith(spec.name, "z_proj.weight")) {
      InitialiseGate(options.seed, spec, mixers);
    } else if (gain && !(options.from_teacher && teacher.Has(spec.name))) {
      std::fill_n(tensor.Data<float>(), spec.numel, 1.0F);
    } else if (!options.from_teacher) {
      InitialiseNormal(options.seed, spec, deviation, mixers);
    } else if (EndsWith(spec.name, "k_proj.weight") || EndsWith(spec.name, "v_proj.weight")) {
      ExpandHeads(teacher.Get(spec.name), teacher_config.head_dim, tensor);
    } else {
      Copy(teacher.Get(spec.name), tensor);
    }
  }
  return mixers;
}

}  // namespace sala::recipes
