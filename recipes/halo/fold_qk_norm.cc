#include "recipes/halo/fold_qk_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "core/check.h"
#include "model/mixer.h"
#include "parallel/ordered_sum.h"

namespace sala::recipes {
namespace {

using model::MixerType;
using model::ParameterSpec;

std::string MixerPrefix(int64_t layer) {
  return "model.layers." + std::to_string(layer) + ".self_attn.";
}

// What is summed of each head over tokens: its RMS, and the square of that.
enum HeadSum : int64_t { kRms, kRmsSquare, kHeadSums };

// Where the sums of a model's heads stand in one row of numbers: for each softmax layer those of
// the queries, then those of the keys.
class Columns {
 public:
  explicit Columns(const model::ModelConfig& config) : config_(config) {
    for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
      first_.push_back(width_);
      if (config.mixer(layer) == MixerType::kSoftmax)
        width_ += kHeadSums * (config.num_attention_heads + config.num_key_value_heads);
    }
  }
  int64_t queries(int64_t layer) const { return first_[static_cast<size_t>(layer)]; }
  int64_t keys(int64_t layer) const {
    return queries(layer) + kHeadSums * config_.num_attention_heads;
  }
  int64_t width() const { return width_; }

 private:
  const model::ModelConfig& config_;
  std::vector<int64_t> first_;
  int64_t width_ = 0;
};

// Adds the heads of rstd f32 [T, N] to sums [N, kHeadSums].
void AddHeads(const Context& ctx, const ConstTensor& rstd, double* sums) {
  std::vector<float> values(static_cast<size_t>(rstd.numel()));
  if (values.empty()) return;
  if (ctx.cuda()) {
    ctx.gpu->Download(values.data(), rstd.raw(), values.size() * sizeof(float));
  } else {
    std::memcpy(values.data(), rstd.raw(), values.size() * sizeof(float));
  }
  const auto heads = static_cast<size_t>(rstd.dim(1));
  for (size_t i = 0; i < values.size(); ++i) {
    const double rms = 1.0 / values[i];
    double* head = sums + i % heads * kHeadSums;
    head[kRms] += rms;
    head[kRmsSquare] += rms * rms;
  }
}

// The sums of one batch, of the tokens and heads that this rank computes, added to `row`.
void AddBatch(const Context& ctx, Arena& arena, const model::Model& model,
              const std::vector<ParameterSpec>& specs, const Columns& columns,
              const model::Batch& batch, double* row) {
  const ArenaScope scope(arena);
  const model::ModelConfig& config = model.config();
  const model::RunOptions options;
  const model::BatchTables tables =
      model::MakeBatchTables(ctx, arena, config, model.spread(), batch, options);
  const auto on_layer = [&](int64_t layer, const ConstTensor& normed, const ConstTensor&) {
    if (config.mixer(layer) != MixerType::kSoftmax) return;
    const ArenaScope layer_scope(arena);
    const Tensor y = arena.New(ctx.activation(), {tables.share.part(), config.hidden_size});
    model.tensors().Enter(model::UnitOfLayer(layer));
    const model::MixerState state =
        model::MixerForward(ctx, arena, config, model.spread(), MixerType::kSoftmax,
                            model.tensors().layers[static_cast<size_t>(layer)].mixer, tables,
                            options, normed, {.y = y});
    // Heads that several tensor ranks have are counted by one of them.
    const auto first_head = [&](const char* projection) {
      const std::string name = MixerPrefix(layer) + projection;
      const auto spec = std::find_if(specs.begin(), specs.end(),
                                     [&](const ParameterSpec& s) { return s.name == name; });
      return spec->owner ? spec->box_offset[0] / config.head_dim : -1;
    };
    if (const int64_t head = first_head("q_proj.weight"); head >= 0)
      AddHeads(ctx, state.q_rstd, row + columns.queries(layer) + kHeadSums * head);
    if (const int64_t head = first_head("k_proj.weight"); head >= 0)
      AddHeads(ctx, state.k_rstd, row + columns.keys(layer) + kHeadSums * head);
  };
  model.ForwardOnly(ctx, arena, batch, options, 0, {}, on_layer);
}

// Rows of head h times scales[h] and, channel by channel, the gain.
void ScaleRows(const std::vector<double>& scales, const ConstTensor& gain,
               const ParameterSpec& spec, const Tensor& weight) {
  const int64_t head_dim = gain.dim(0);
  for (int64_t row = 0; row < weight.dim(0); ++row) {
    const auto head = static_cast<size_t>((spec.box_offset[0] + row) / head_dim);
    const double factor = scales[head] * gain.Data<float>()[row % head_dim];
    auto* out = weight.Row<float>(row);
    for (int64_t i = 0; i < weight.dim(1); ++i) out[i] = static_cast<float>(factor * out[i]);
  }
}

}  // namespace

nlohmann::json ToJson(const std::vector<QkScales>& scales) {
  nlohmann::json layers = nlohmann::json::array();
  for (const QkScales& layer : scales) layers.push_back({{"q", layer.q}, {"k", layer.k}});
  return layers;
}

StatusOr<std::vector<QkScales>> QkScalesFromJson(const nlohmann::json& json,
                                                 const model::ModelConfig& config,
                                                 const std::string& where) {
  std::vector<QkScales> scales;
  try {
    for (const nlohmann::json& layer : json) {
      scales.push_back({.q = layer.at("q").get<std::vector<double>>(),
                        .k = layer.at("k").get<std::vector<double>>()});
    }
  } catch (const nlohmann::json::exception&) {
    scales.clear();
  }
  bool fits = static_cast<int64_t>(scales.size()) == config.num_hidden_layers;
  for (size_t layer = 0; fits && layer < scales.size(); ++layer) {
    const bool softmax = config.mixer(static_cast<int64_t>(layer)) == MixerType::kSoftmax;
    fits =
        static_cast<int64_t>(scales[layer].q.size()) ==
            (softmax ? config.num_attention_heads : 0) &&
        static_cast<int64_t>(scales[layer].k.size()) == (softmax ? config.num_key_value_heads : 0);
  }
  if (fits) return scales;
  return MakeError(ExitCode::kData, "CKPT-MANIFEST",
                   where + ": is not one list of numbers a head for each softmax layer");
}

StatusOr<std::vector<QkScales>> MeasureQkScales(const Context& ctx, Arena& arena,
                                                const model::Model& model,
                                                const std::vector<model::Batch>& batches,
                                                const parallel::Mesh& mesh) {
  const model::ModelConfig& config = model.config();
  SALA_CHECK(config.attn_qk_norm);
  const Columns columns(config);
  const std::vector<ParameterSpec> specs = model::ParameterSpecs(config, model.spread().shard());
  std::vector<double> mine(batches.size() * static_cast<size_t>(columns.width()), 0.0);
  for (size_t i = 0; i < batches.size(); ++i) {
    AddBatch(ctx, arena, model, specs, columns, batches[i],
             mine.data() + i * static_cast<size_t>(columns.width()));
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<double> sums,
                        parallel::SumDealtItems(mesh, std::move(mine), columns.width()));
  bool finite = true;
  const auto factors = [&](int64_t first, int64_t heads) {
    std::vector<double> of_heads;
    for (int64_t head = 0; head < heads; ++head) {
      const double* sum = sums.data() + first + kHeadSums * head;
      of_heads.push_back(sum[kRms] / sum[kRmsSquare]);
      finite = finite && std::isfinite(of_heads.back());
    }
    return of_heads;
  };
  std::vector<QkScales> scales(static_cast<size_t>(config.num_hidden_layers));
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (config.mixer(layer) != MixerType::kSoftmax) continue;
    scales[static_cast<size_t>(layer)] = {
        .q = factors(columns.queries(layer), config.num_attention_heads),
        .k = factors(columns.keys(layer), config.num_key_value_heads)};
  }
  if (finite) return scales;
  return MakeError(ExitCode::kNumbers, "NUM-NONFINITE",
                   "the queries and keys of the softmax layers are not finite numbers; the student "
                   "diverged: lower halo.distil.schedule.peak_lr");
}

Hybrid FoldQkNorm(Hybrid hybrid, const std::vector<QkScales>& scales,
                  const model::TensorShard& shard) {
  Hybrid folded;
  folded.config = hybrid.config;
  folded.config.attn_qk_norm = false;
  folded.params = model::ParameterStore(model::ParameterSpecs(folded.config, shard));
  for (const ParameterSpec& spec : folded.params.specs()) {
    std::memcpy(folded.params.Get(spec.name).raw(), hybrid.params.Get(spec.name).raw(),
                static_cast<size_t>(spec.numel) * sizeof(float));
  }
  for (int64_t layer = 0; layer < folded.config.num_hidden_layers; ++layer) {
    if (folded.config.mixer(layer) != MixerType::kSoftmax) continue;
    const QkScales& of_layer = scales[static_cast<size_t>(layer)];
    const std::string prefix = MixerPrefix(layer);
    for (const auto& [name, factors] :
         {std::make_pair("q", &of_layer.q), std::make_pair("k", &of_layer.k)}) {
      const std::string projection = prefix + name + "_proj.weight";
      ScaleRows(*factors, hybrid.params.Get(prefix + name + "_norm.weight"),
                folded.params.Spec(projection), folded.params.Get(projection));
    }
  }
  return folded;
}

}  // namespace sala::recipes
