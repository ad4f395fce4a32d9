#include "recipes/gates.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/elementary.h"
#include "kernels/gemm/gemm.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

constexpr int64_t kTokens = 256;

// The first tokens of a batch, its documents cut.
model::Batch FirstTokens(const model::Batch& batch, int64_t tokens) {
  if (batch.size() <= tokens) return batch;
  const auto n = static_cast<size_t>(tokens);
  model::Batch first;
  first.tokens.assign(batch.tokens.begin(), batch.tokens.begin() + tokens);
  first.labels.assign(n, -1);
  first.positions.assign(batch.positions.begin(), batch.positions.begin() + tokens);
  for (const int32_t border : batch.cu_seqlens) {
    if (border < tokens) first.cu_seqlens.push_back(border);
  }
  first.cu_seqlens.push_back(static_cast<int32_t>(tokens));
  return first;
}

double SumOfSigmoids(const Context& ctx, const Tensor& z) {
  const auto count = static_cast<size_t>(z.numel());
  std::vector<float> values(count);
  if (ctx.cuda()) {
    std::vector<BF16> stored(count);
    ctx.gpu->Download(stored.data(), z.raw(), count * sizeof(BF16));
    ctx.gpu->Synchronize();
    std::transform(stored.begin(), stored.end(), values.begin(),
                   [](BF16 value) { return static_cast<float>(value); });
  } else {
    const auto* data = z.Data<float>();
    values.assign(data, data + count);
  }
  double sum = 0;
  for (const float value : values) sum += 1 / (1 + PortableExp(-static_cast<double>(value)));
  return sum;
}

}  // namespace

StatusOr<std::vector<double>> GateMeans(Session& session, const model::Model& model,
                                        const data::ValidationSet& set,
                                        const model::RunOptions& options) {
  const Context& ctx = session.ctx();
  const auto layers = static_cast<size_t>(model.config().num_hidden_layers);
  // Of each layer the sum of its gates here and their number.
  std::vector<double> sums(2 * layers, 0.0);
  std::vector<data::PackedSample> samples;
  Status status;
  if (session.mesh().dp_rank() < set.size()) {
    auto sample = set.Get(session.mesh().dp_rank());
    status = sample.status();
    if (sample.ok()) samples.push_back(std::move(sample).value());
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), status));
  const model::Batch batch = FirstTokens(MakeBatch(samples), kTokens);
  Arena& arena = session.arena();
  const ArenaScope scope(arena);
  const auto on_layer = [&](int64_t layer, const ConstTensor& normed, const ConstTensor&) {
    const auto l = static_cast<size_t>(layer);
    const Tensor& gate = model.tensors().layers[l].mixer.gate;
    if (gate.empty() || normed.dim(0) == 0) return;
    const ArenaScope layer_scope(arena);
    const Tensor z = arena.New(ctx.activation(), {normed.dim(0), gate.dim(0)});
    kernels::GemmNT(ctx, normed, gate, z);
    sums[2 * l] += SumOfSigmoids(ctx, z);
    sums[2 * l + 1] += static_cast<double>(z.numel());
  };
  model.ForwardOnly(ctx, arena, batch, options, 0, {}, on_layer);
  SALA_RETURN_IF_ERROR(session.world().AllReduce(std::span<double>(sums), parallel::Reduce::kSum));
  std::vector<double> means;
  for (size_t l = 0; l < layers; ++l)
    means.push_back(sums[2 * l + 1] > 0 ? sums[2 * l] / sums[2 * l + 1] : std::nan(""));
  return means;
}

Status WriteGates(Session& session, const std::string& stage, const model::Model& model,
                  const data::ValidationSet& set, const model::RunOptions& options) {
  SALA_ASSIGN_OR_RETURN(const std::vector<double> means, GateMeans(session, model, set, options));
  if (std::none_of(means.begin(), means.end(), [](double mean) { return std::isfinite(mean); }))
    return OkStatus();
  auto mixers = nlohmann::ordered_json::array();
  auto values = nlohmann::ordered_json::array();
  for (size_t l = 0; l < means.size(); ++l) {
    mixers.push_back(model::NameOf(model.config().mixer(static_cast<int64_t>(l))));
    values.push_back(std::isfinite(means[l]) ? nlohmann::ordered_json(means[l]) : nullptr);
  }
  session.WriteGates(
      {{"step", session.global_step}, {"stage", stage}, {"mixers", mixers}, {"means", values}});
  return OkStatus();
}

}  // namespace sala::recipes
