#include "recipes/optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>

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

Optimizer::Optimizer(const Context& ctx, const OptimizerConfig& config,
                     const model::ModelConfig& model, model::ComputeParameters& params,
                     const std::function<bool(const model::ParameterSpec&)>& trainable,
                     const parallel::Mesh& mesh, bool rank_independent)
    : config_(config), params_(params), mesh_(mesh) {
  const bool split = mesh.config().zero_stage >= 1;
  const int64_t size = params.host().size();
  if (rank_independent) {
    const int64_t piece = NormPiece(size);
    partition_ = parallel::FlatPartition::Even(size, mesh.dp_size(), piece);
    for (int64_t begin = 0; begin < size; begin += piece) norm_borders_.push_back(begin);
    norm_borders_.push_back(size);
  } else {
    partition_ = parallel::FlatPartition::Even(size, mesh.dp_size());
    norm_borders_ = partition_.begin;
  }
  begin_ = split ? shard_begin() : 0;
  end_ = split ? shard_end() : size;
  for (const model::ParameterSpec& spec : params.host().specs()) {
    const int64_t begin = std::max(begin_, spec.offset);
    const int64_t end = std::min(end_, spec.offset + spec.numel);
    if (begin >= end || !trainable(spec)) continue;
    segments_.push_back({.spec = &spec,
                         .begin = begin,
                         .end = end,
                         .lr_multiplier = LearningRateMultiplier(config, model, spec),
                         .weight_decay = WeightDecay(config, spec)});
  }
  const size_t bytes = static_cast<size_t>(end_ - begin_) * sizeof(float);
  grad_ = Buffer(bytes, ctx.gpu);
  exp_avg_ = Buffer(bytes, ctx.gpu);
  exp_avg_sq_ = Buffer(bytes, ctx.gpu);
  if (ctx.cuda()) {
    master_ = Buffer(bytes, ctx.gpu);
    TakeParameters(ctx);
  }
}

Tensor Optimizer::Range(const Buffer& buffer, int64_t begin, int64_t end) const {
  return Tensor(static_cast<float*>(buffer.data()) + (begin - begin_), DType::kF32, {end - begin},
                buffer.device() == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda);
}

void Optimizer::TakeParameters(const Context& ctx) {
  if (!ctx.cuda()) return;
  params_.Refresh(ctx);
  ctx.gpu->Upload(master_.data(), params_.host().data() + begin_, master_.bytes());
}

void Optimizer::ReadShard(const Context& ctx) {
  if (!ctx.cuda()) return;
  const auto n = static_cast<size_t>(end_ - begin_);
  saved_avg_.resize(n);
  saved_avg_sq_.resize(n);
  ctx.gpu->Download(saved_avg_.data(), exp_avg_.data(), exp_avg_.bytes());
  ctx.gpu->Download(saved_avg_sq_.data(), exp_avg_sq_.data(), exp_avg_sq_.bytes());
  ctx.gpu->Download(params_.host().data() + begin_, master_.data(), master_.bytes());
}

Status Optimizer::ReadAll(const Context& ctx) {
  if (!ctx.cuda()) return OkStatus();
  model::ParameterStore& host = params_.host();
  ctx.gpu->Download(host.data() + begin_, master_.data(), master_.bytes());
  if (mesh_.config().zero_stage == 0) return OkStatus();
  const auto count = static_cast<size_t>(shard_end() - shard_begin());
  return parallel::AllGatherInPieces(mesh_.dp_group(), {host.data() + shard_begin(), count},
                                     partition_.counts,
                                     {host.data(), static_cast<size_t>(host.size())});
}

// Of the whole gradient, of which this rank has its shard: a sum for each piece, zero where another
// rank has it, added in order of the pieces.
StatusOr<double> Optimizer::SumOfSquares(const Context& ctx, const Tensor& shard) {
  std::vector<double> pieces(norm_borders_.size() - 1, 0.0);
  for (size_t p = 0; p < pieces.size(); ++p) {
    const int64_t begin = norm_borders_[p];
    const int64_t end = norm_borders_[p + 1];
    if (begin < shard_begin() || end > shard_end() || begin == end) continue;
    pieces[p] = kernels::SumOfSquares(ctx, shard.Rows(begin - shard_begin(), end - shard_begin()));
  }
  SALA_RETURN_IF_ERROR(
      mesh_.dp_group().AllReduce(std::span<double>(pieces), parallel::Reduce::kSum));
  return std::accumulate(pieces.begin(), pieces.end(), 0.0);
}

StatusOr<UpdateResult> Optimizer::Update(const Context& ctx, model::ParameterStore& gradients,
                                         double learning_rate, bool loss_finite) {
  parallel::Communicator& group = mesh_.dp_group();
  const bool split = mesh_.config().zero_stage >= 1;
  const Tensor shard = Range(grad_, shard_begin(), shard_end());
  SALA_RETURN_IF_ERROR(
      group.ReduceScatterSum(ConstTensor(gradients.Flat()), partition_.counts, shard));
  SALA_ASSIGN_OR_RETURN(const double sum_of_squares, SumOfSquares(ctx, shard));
  if (!split) {
    SALA_RETURN_IF_ERROR(
        group.AllGather(ConstTensor(shard), partition_.counts, Range(grad_, begin_, end_)));
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
  model::ParameterStore& computed = params_.store();
  for (const Segment& segment : segments_) {
    options.learning_rate = learning_rate * segment.lr_multiplier;
    options.weight_decay = segment.weight_decay;
    const auto [begin, end] = std::pair(segment.begin, segment.end);
    const Tensor compute = computed.Flat(begin, end);
    kernels::AdamWStep(ctx, ctx.cuda() ? Range(master_, begin, end) : compute,
                       Range(grad_, begin, end), Range(exp_avg_, begin, end),
                       Range(exp_avg_sq_, begin, end), options, ctx.cuda() ? compute : Tensor());
  }
  if (split) {
    SALA_RETURN_IF_ERROR(group.AllGather(ConstTensor(computed.Flat(shard_begin(), shard_end())),
                                         partition_.counts, computed.Flat()));
  }
  return result;
}

void Optimizer::AppendSlices(std::vector<TensorSlice>* slices) const {
  if (mesh_.config().zero_stage == 0 && mesh_.dp_rank() != 0)
    return;  // copies: the lowest rank writes
  const bool on_device = master_.bytes() > 0;
  const float* avg = on_device ? saved_avg_.data() : static_cast<float*>(exp_avg_.data());
  const float* avg_sq = on_device ? saved_avg_sq_.data() : static_cast<float*>(exp_avg_sq_.data());
  for (const Segment& segment : segments_) {
    TensorSlice slice;
    slice.name = segment.spec->name;
    slice.shape = segment.spec->shape;
    slice.flat_begin = segment.begin - segment.spec->offset;
    slice.flat_end = segment.end - segment.spec->offset;
    slice.kind = TensorKind::kExpAvg;
    slice.data = avg + (segment.begin - begin_);
    slices->push_back(slice);
    slice.kind = TensorKind::kExpAvgSq;
    slice.data = avg_sq + (segment.begin - begin_);
    slices->push_back(slice);
  }
}

Status Optimizer::Load(const Context& ctx, const Checkpoint& checkpoint) {
  std::vector<float> values;
  for (const Segment& segment : segments_) {
    const int64_t begin = segment.begin - segment.spec->offset;
    const int64_t end = segment.end - segment.spec->offset;
    values.resize(static_cast<size_t>(end - begin));
    for (const auto& [kind, buffer] : {std::pair(TensorKind::kExpAvg, &exp_avg_),
                                       std::pair(TensorKind::kExpAvgSq, &exp_avg_sq_)}) {
      SALA_RETURN_IF_ERROR(checkpoint.ReadF32(segment.spec->name, kind, begin, end, values.data()));
      void* to = Range(*buffer, segment.begin, segment.end).raw();
      const size_t bytes = values.size() * sizeof(float);
      if (ctx.cuda()) {
        ctx.gpu->Upload(to, values.data(), bytes);
      } else {
        std::memcpy(to, values.data(), bytes);
      }
    }
  }
  return OkStatus();
}

}  // namespace sala::recipes
