#include "recipes/optimizer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "kernels/adamw/adamw.h"
#include "kernels/global_norm/global_norm.h"

namespace sala::recipes {
namespace {

// Whether a tensor belongs to a linear mixer: "model.layers.I.self_attn.*" of a Lightning layer.
bool InLinearMixer(const model::ModelConfig& model, const std::string& name) {
  constexpr char kPrefix[] = "model.layers.";
  if (name.rfind(kPrefix, 0) != 0 || name.find(".self_attn.") == std::string::npos) return false;
  const int64_t layer = std::stoll(name.substr(sizeof(kPrefix) - 1));
  return model.mixer(layer) == model::MixerType::kLightning;
}

// At most 1024 pieces, so that they are one short message and a shard is at most a thousandth of
// the buffer larger than another; a multiple of the alignment of shards.
int64_t NormPiece(int64_t n) { return std::max<int64_t>(1, (n + 16383) / 16384) * 16; }

}  // namespace

double LearningRateMultiplier(const OptimizerConfig& config, const model::ModelConfig& model,
                              const model::ParameterSpec& spec) {
  double multiplier = 1;
  switch (spec.kind) {
    case model::ParameterKind::kMatrix:
      multiplier = config.matrix_lr_multiplier > 0 ? config.matrix_lr_multiplier
                                                   : 1.0 / model.width_multiplier();
      break;
    case model::ParameterKind::kVector:
      multiplier = config.vector_lr_multiplier;
      break;
    case model::ParameterKind::kEmbedding:
      multiplier = config.embedding_lr_multiplier;
      break;
    case model::ParameterKind::kHead:
      multiplier = config.head_lr_multiplier;
      break;
  }
  return InLinearMixer(model, spec.name) ? multiplier * config.mixer_lr_multiplier : multiplier;
}

double WeightDecay(const OptimizerConfig& config, const model::ParameterSpec& spec) {
  const bool decayed =
      spec.kind == model::ParameterKind::kMatrix || spec.kind == model::ParameterKind::kHead;
  return decayed ? config.weight_decay : 0.0;
}

Optimizer::Optimizer(const OptimizerConfig& config, const model::ModelConfig& model,
                     model::ParameterStore& params,
                     const std::function<bool(const model::ParameterSpec&)>& trainable,
                     const parallel::Mesh& mesh, bool rank_independent)
    : config_(config), params_(params), mesh_(mesh) {
  const bool split = mesh.config().zero_stage >= 1;
  if (rank_independent) {
    const int64_t piece = NormPiece(params.size());
    partition_ = parallel::FlatPartition::Even(params.size(), mesh.dp_size(), piece);
    for (int64_t begin = 0; begin < params.size(); begin += piece) norm_borders_.push_back(begin);
    norm_borders_.push_back(params.size());
  } else {
    partition_ = parallel::FlatPartition::Even(params.size(), mesh.dp_size());
    norm_borders_ = partition_.begin;
  }
  begin_ = split ? partition_.begin[static_cast<size_t>(mesh.dp_rank())] : 0;
  end_ = split ? partition_.begin[static_cast<size_t>(mesh.dp_rank()) + 1] : params.size();
  for (const model::ParameterSpec& spec : params.specs()) {
    const int64_t begin = std::max(begin_, spec.offset);
    const int64_t end = std::min(end_, spec.offset + spec.numel);
    if (begin >= end || !trainable(spec)) continue;
    segments_.push_back({.spec = &spec,
                         .begin = begin,
                         .end = end,
                         .lr_multiplier = LearningRateMultiplier(config, model, spec),
                         .weight_decay = WeightDecay(config, spec)});
  }
  const auto n = static_cast<size_t>(end_ - begin_);
  grad_.resize(n);
  exp_avg_.resize(n);
  exp_avg_sq_.resize(n);
}

// Of the whole gradient, of which this rank has its shard: a sum for each piece, zero where another
// rank has it, added in order of the pieces.
StatusOr<double> Optimizer::SumOfSquares(const Context& ctx, const float* shard) {
  const auto rank = static_cast<size_t>(mesh_.dp_rank());
  const int64_t shard_begin = partition_.begin[rank];
  const int64_t shard_end = partition_.begin[rank + 1];
  std::vector<double> pieces(norm_borders_.size() - 1, 0.0);
  for (size_t p = 0; p < pieces.size(); ++p) {
    const int64_t begin = norm_borders_[p];
    const int64_t end = norm_borders_[p + 1];
    if (begin < shard_begin || end > shard_end || begin == end) continue;
    pieces[p] =
        kernels::SumOfSquares(ctx, ConstTensor(shard + (begin - shard_begin), {end - begin}));
  }
  SALA_RETURN_IF_ERROR(
      mesh_.dp_group().AllReduce(std::span<double>(pieces), parallel::Reduce::kSum));
  return std::accumulate(pieces.begin(), pieces.end(), 0.0);
}

StatusOr<UpdateResult> Optimizer::Update(const Context& ctx, model::ParameterStore& gradients,
                                         double learning_rate, bool loss_finite) {
  parallel::Communicator& group = mesh_.dp_group();
  const auto rank = static_cast<size_t>(mesh_.dp_rank());
  const bool split = mesh_.config().zero_stage >= 1;
  const int64_t shard_begin = partition_.begin[rank];
  const int64_t shard_count = partition_.counts[rank];
  float* shard = grad_.data() + (shard_begin - begin_);

  SALA_RETURN_IF_ERROR(
      group.ReduceScatterSum({gradients.data(), static_cast<size_t>(gradients.size())},
                             partition_.counts, {shard, static_cast<size_t>(shard_count)}));
  SALA_ASSIGN_OR_RETURN(const double sum_of_squares, SumOfSquares(ctx, shard));
  if (!split) {
    SALA_RETURN_IF_ERROR(
        group.AllGather({shard, static_cast<size_t>(shard_count)}, partition_.counts, grad_));
  }

  UpdateResult result;
  result.grad_norm = std::sqrt(sum_of_squares);
  if (!loss_finite || !std::isfinite(result.grad_norm)) {
    result.skipped = true;
    return result;
  }
  double grad_scale = 1;
  if (config_.clip_norm > 0 && result.grad_norm > config_.clip_norm) {
    grad_scale = config_.clip_norm / result.grad_norm;
    result.clipped = true;
  }

  ++updates_;
  kernels::AdamWOptions options{.beta1 = config_.beta1,
                                .beta2 = config_.beta2,
                                .eps = config_.eps,
                                .step = updates_,
                                .grad_scale = grad_scale};
  for (const Segment& segment : segments_) {
    options.learning_rate = learning_rate * segment.lr_multiplier;
    options.weight_decay = segment.weight_decay;
    const int64_t n = segment.end - segment.begin;
    const int64_t at = segment.begin - begin_;
    kernels::AdamWStep(ctx, Tensor(params_.data() + segment.begin, {n}),
                       ConstTensor(grad_.data() + at, {n}), Tensor(exp_avg_.data() + at, {n}),
                       Tensor(exp_avg_sq_.data() + at, {n}), options);
  }
  if (split) {
    SALA_RETURN_IF_ERROR(
        group.AllGather({params_.data() + shard_begin, static_cast<size_t>(shard_count)},
                        partition_.counts, {params_.data(), static_cast<size_t>(params_.size())}));
  }
  return result;
}

void Optimizer::AppendSlices(std::vector<TensorSlice>* slices) const {
  if (mesh_.config().zero_stage == 0 && mesh_.dp_rank() != 0)
    return;  // copies: the lowest rank writes
  for (const Segment& segment : segments_) {
    TensorSlice slice;
    slice.name = segment.spec->name;
    slice.shape = segment.spec->shape;
    slice.flat_begin = segment.begin - segment.spec->offset;
    slice.flat_end = segment.end - segment.spec->offset;
    slice.kind = TensorKind::kExpAvg;
    slice.data = exp_avg_.data() + (segment.begin - begin_);
    slices->push_back(slice);
    slice.kind = TensorKind::kExpAvgSq;
    slice.data = exp_avg_sq_.data() + (segment.begin - begin_);
    slices->push_back(slice);
  }
}

Status Optimizer::Load(const Checkpoint& checkpoint) {
  for (const Segment& segment : segments_) {
    const int64_t begin = segment.begin - segment.spec->offset;
    const int64_t end = segment.end - segment.spec->offset;
    const std::string& name = segment.spec->name;
    SALA_RETURN_IF_ERROR(checkpoint.ReadF32(name, TensorKind::kExpAvg, begin, end,
                                            exp_avg_.data() + (segment.begin - begin_)));
    SALA_RETURN_IF_ERROR(checkpoint.ReadF32(name, TensorKind::kExpAvgSq, begin, end,
                                            exp_avg_sq_.data() + (segment.begin - begin_)));
  }
  return OkStatus();
}

}  // namespace sala::recipes
