#include "recipes/halo/align.h"

#include <cmath>

#include "core/trace.h"
#include "kernels/mse/mse.h"
#include "model/mixer.h"
#include "parallel/ordered_sum.h"
#include "recipes/halo/transfer.h"

namespace sala::recipes {
namespace {

using model::MixerTensors;
using model::MixerType;

// What is summed per layer, over tokens and features (the norm: over tokens).
enum LayerSum : size_t { kSquaredError, kTargetSum, kTargetSquare, kNormSum, kLayerSums };

std::vector<MixerTensors> BindAll(const model::ModelConfig& config, model::ParameterStore& store) {
  std::vector<MixerTensors> all;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    all.push_back(model::BindMixer(config, layer, MixerType::kLightning, store));
  }
  return all;
}

// Sum over tokens of the Euclidean norm of y - target; dy = scale * (y - target) / norm, zero where
// the norm is zero.
double NormLoss(const ConstTensor& y, const ConstTensor& target, double scale, const Tensor& dy) {
  const int64_t width = y.dim(1);
  double sum = 0;
  for (int64_t t = 0; t < y.dim(0); ++t) {
    const auto* a = y.Row<float>(t);
    const auto* b = target.Row<float>(t);
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) {
      const double difference = static_cast<double>(a[i]) - b[i];
      squares += difference * difference;
    }
    const double norm = std::sqrt(squares);
    sum += norm;
    if (dy.empty()) continue;
    auto* d = dy.Row<float>(t);
    const double factor = norm > 0 ? scale / norm : 0.0;
    for (int64_t i = 0; i < width; ++i)
      d[i] = static_cast<float>(factor * (static_cast<double>(a[i]) - b[i]));
  }
  return sum;
}

}  // namespace

AlignTask::AlignTask(const Context& ctx, parallel::Mesh& mesh, const model::Model& teacher,
                     model::ParameterStore& mixers, AlignLoss loss,
                     const data::ValidationSet* held_out)
    : mesh_(mesh),
      teacher_(teacher),
      config_(AllLinear(teacher.config())),
      mixers_(ctx, mixers, &mesh),
      weights_(BindAll(config_, mixers_.store())),
      loss_(loss),
      held_out_(held_out) {}

void AlignTask::LayerLoss(const Context& ctx, const ConstTensor& y, const ConstTensor& target,
                          double tokens, const Tensor& dy, std::span<double> layer_sums) const {
  const PartScope part(StepPart::kLoss);
  const auto layers = static_cast<double>(config_.num_hidden_layers);
  const auto width = static_cast<double>(config_.hidden_size);
  const bool squared = loss_ == AlignLoss::kMse;
  const kernels::MseResult result = kernels::MeanSquaredError(
      ctx, y, target, static_cast<float>(1.0 / (layers * tokens * width)), squared ? dy : Tensor{});
  layer_sums[kSquaredError] += result.squared_error;
  layer_sums[kTargetSum] += result.target_sum;
  layer_sums[kTargetSquare] += result.target_square;
  if (!squared)
    layer_sums[kNormSum] += NormLoss(y, target, 1.0 / (layers * tokens * std::sqrt(width)), dy);
}

void AlignTask::Pass(const Context& ctx, Arena& arena, const model::Batch& batch, double tokens,
                     const std::vector<MixerTensors>& gradients, model::UnitHooks* gradient_hooks,
                     std::span<double> sums) const {
  const ArenaScope scope(arena);
  const model::Spread& spread = teacher_.spread();
  const model::RunOptions options;  // dense attention: conversion runs far below the sparse lengths
  const model::BatchTables tables =
      model::MakeBatchTables(ctx, arena, config_, spread, batch, options);
  const auto on_layer = [&](int64_t layer, const ConstTensor& normed, const ConstTensor& target) {
    const ArenaScope layer_scope(arena);
    const auto l = static_cast<size_t>(layer);
    mixers_.Enter(model::UnitOfLayer(layer));
    const Tensor y = arena.New(ctx.activation(), {tables.share.part(), config_.hidden_size});
    const model::MixerState state =
        model::MixerForward(ctx, arena, config_, spread, MixerType::kLightning, weights_[l], tables,
                            options, normed, {.y = y});
    Tensor dy;
    if (!gradients.empty())
      dy = arena.New(ctx.activation(), {tables.share.part(), config_.hidden_size});
    LayerLoss(ctx, y, target, tokens, dy, sums.subspan(l * kLayerSums, kLayerSums));
    if (gradients.empty()) return;
    const PartScope part(StepPart::kBackward);
    if (gradient_hooks != nullptr) gradient_hooks->Enter(model::UnitOfLayer(layer));
    model::MixerBackward(ctx, arena, config_, spread, MixerType::kLightning, weights_[l], tables,
                         state, 1.0F, spread.Gather(ctx, arena, tables.share, dy), {},
                         gradients[l]);
    if (gradient_hooks != nullptr) gradient_hooks->Leave(model::UnitOfLayer(layer));
  };
  teacher_.ForwardOnly(ctx, arena, batch, options, 0, {}, on_layer);
}

Status AlignTask::MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                             const StepCounts& counts, model::ParameterStore& gradients,
                             std::span<double> sums) {
  Pass(ctx, arena, batch, static_cast<double>(counts.tokens), BindAll(config_, gradients),
       gradients.hooks(), sums);
  return OkStatus();
}

std::vector<std::string> AlignTask::SumNames() const {
  std::vector<std::string> names;
  for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const std::string suffix = "_" + std::to_string(layer);
    names.push_back("squared_error" + suffix);
    names.push_back("target_sum" + suffix);
    names.push_back("target_square" + suffix);
    names.push_back("norm_sum" + suffix);
  }
  return names;
}

std::vector<std::pair<std::string, double>> AlignTask::Values(std::span<const double> sums,
                                                              const StepCounts& counts) const {
  const auto layers = static_cast<double>(config_.num_hidden_layers);
  const auto tokens = static_cast<double>(counts.tokens);
  const auto width = static_cast<double>(config_.hidden_size);
  const double elements = tokens * width;
  double loss = 0;
  double mean_error = 0;
  std::vector<std::pair<std::string, double>> per_layer;
  for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    const std::span<const double> s =
        sums.subspan(static_cast<size_t>(layer) * kLayerSums, kLayerSums);
    const double mean = s[kTargetSum] / elements;
    const double variance = s[kTargetSquare] / elements - mean * mean;
    const double relative = s[kSquaredError] / elements / variance;
    loss += (loss_ == AlignLoss::kMse ? s[kSquaredError] / elements
                                      : s[kNormSum] / (tokens * std::sqrt(width))) /
            layers;
    mean_error += relative / layers;
    per_layer.emplace_back("relative_error_" + std::to_string(layer), relative);
  }
  std::vector<std::pair<std::string, double>> values = {{"loss", loss},
                                                        {"relative_error", mean_error}};
  values.insert(values.end(), per_layer.begin(), per_layer.end());
  return values;
}

StatusOr<std::vector<std::pair<std::string, double>>> AlignTask::Evaluate(
    const Context& ctx, Arena& arena, const std::vector<model::Batch>& batches) {
  const int64_t width = config_.num_hidden_layers * kLayerSums + 1;
  std::vector<double> mine(batches.size() * static_cast<size_t>(width), 0.0);
  for (size_t i = 0; i < batches.size(); ++i) {
    const std::span<double> sums =
        std::span(mine).subspan(i * static_cast<size_t>(width), static_cast<size_t>(width));
    Pass(ctx, arena, batches[i], 1.0, {}, nullptr, sums.first(sums.size() - 1));
    const bool first = mesh_.sample_group().rank() == 0;  // said once for those on the same samples
    sums.back() = first ? static_cast<double>(batches[i].size()) : 0.0;
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<double> sums,
                        parallel::SumDealtItems(mesh_, mine, width));
  return Values(std::span<const double>(sums).first(sums.size() - 1),
                {.tokens = static_cast<int64_t>(sums.back())});
}

StatusOr<std::vector<std::pair<std::string, double>>> AlignTask::Validate(Session& session) {
  std::vector<std::pair<std::string, double>> none;
  if (held_out_ == nullptr || held_out_->size() == 0) return none;
  SALA_ASSIGN_OR_RETURN(const std::vector<model::Batch> mine,
                        HeldOutBatches(*held_out_, session.mesh()));
  SALA_ASSIGN_OR_RETURN(auto values, Evaluate(session.ctx(), session.arena(), mine));
  last_errors_.clear();
  for (size_t i = 2; i < values.size(); ++i) last_errors_.push_back(values[i].second);
  if (first_errors_.empty()) first_errors_ = last_errors_;
  return values;
}

}  // namespace sala::recipes
