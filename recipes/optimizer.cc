#include "recipes/optimizer.h"

#include <algorithm>
#include <cmath>
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
                     parallel::Mesh& mesh, GradientReducer& reducer)
    : config_(config), params_(params), mesh_(mesh), reducer_(reducer) {
  const parallel::UnitPartition& partition = reducer.partition();
  for (const model::ParameterSpec& spec : params.host().specs()) {
    const int64_t piece_begin = split() ? partition.begin(spec.unit, mesh.param_rank()) : 0;
    const int64_t piece_end =
        split() ? partition.end(spec.unit, mesh.param_rank()) : params.host().size();
    const int64_t begin = std::max(piece_begin, spec.offset);
    const int64_t end = std::min(piece_end, spec.offset + spec.numel);
    if (begin >= end) continue;
    segments_.push_back({.spec = &spec,
                         .begin = begin,
                         .end = end,
                         .trained = trainable(spec),
                         .lr_multiplier = LearningRateMultiplier(config, model, spec),
                         .weight_decay = WeightDecay(config, spec)});
  }
  const int64_t elements = split() ? partition.shard_size(mesh.param_rank()) : params.host().size();
  const size_t bytes = static_cast<size_t>(elements) * sizeof(float);
  exp_avg_ = Buffer(bytes, ctx.gpu);
  exp_avg_sq_ = Buffer(bytes, ctx.gpu);
  if (ctx.cuda()) {
    master_ = Buffer(bytes, ctx.gpu);
    TakeParameters(ctx);
  }
}

Tensor Optimizer::Range(const Buffer& buffer, int64_t begin, int64_t end) const {
  int64_t place = begin;
  if (split()) {
    const parallel::UnitPartition& partition = reducer_.partition();
    int64_t u = 0;
    while (partition.unit_end(u) <= begin) ++u;
    const int rank = mesh_.param_rank();
    place = partition.shard_begin(u, rank) + begin - partition.begin(u, rank);
  }
  return Tensor(static_cast<float*>(buffer.data()) + place, DType::kF32, {end - begin},
                buffer.device() == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda);
}

void Optimizer::TakeParameters(const Context& ctx) {
  params_.Refresh(ctx);
  if (!ctx.cuda()) return;
  for (const Segment& segment : segments_) {
    const Tensor to = Range(master_, segment.begin, segment.end);
    ctx.gpu->Upload(to.raw(), params_.host().Flat(segment.begin, segment.end).raw(),
                    static_cast<size_t>(to.numel()) * sizeof(float));
  }
}

void Optimizer::ReadShard(const Context& ctx) {
  if (!ctx.cuda()) return;
  saved_avg_.resize(exp_avg_.bytes() / sizeof(float));
  saved_avg_sq_.resize(saved_avg_.size());
  ctx.gpu->Download(saved_avg_.data(), exp_avg_.data(), exp_avg_.bytes());
  ctx.gpu->Download(saved_avg_sq_.data(), exp_avg_sq_.data(), exp_avg_sq_.bytes());
  for (const Segment& segment : segments_) {
    const Tensor from = Range(master_, segment.begin, segment.end);
    ctx.gpu->Download(params_.host().Flat(segment.begin, segment.end).raw(), from.raw(),
                      static_cast<size_t>(from.numel()) * sizeof(float));
  }
}

Status Optimizer::ReadAll(const Context& ctx) {
  params_.Settle();
  ReadShard(ctx);
  if (!split() || mesh_.param_size() == 1) return OkStatus();
  if (!ctx.cuda() && !params_.sharded()) return OkStatus();  // gathered already
  const parallel::UnitPartition& partition = reducer_.partition();
  for (int64_t u = 0; u < partition.units(); ++u) {
    if (partition.unit_size(u) == 0) continue;
    const int rank = mesh_.param_rank();
    const Tensor all = params_.host().Flat(partition.unit_begin(u), partition.unit_end(u));
    const Tensor mine = params_.host().Flat(partition.begin(u, rank), partition.end(u, rank));
    const auto span = [](const Tensor& x) {
      return std::span<float>(x.Data<float>(), static_cast<size_t>(x.numel()));
    };
    SALA_RETURN_IF_ERROR(parallel::AllGatherInPieces(mesh_.param_group(), span(mine),
                                                     partition.counts(u), span(all)));
  }
  return OkStatus();
}

// Of the whole gradient, of which this rank adds up its pieces, and of what several tensor ranks
// hold only what it owns. With sums that do not depend on the ranks, a number for each piece
// travels, zero where another rank has it; otherwise one.
StatusOr<double> Optimizer::SumOfSquares(const Context& ctx) {
  const parallel::UnitPartition& partition = reducer_.partition();
  const int rank = mesh_.param_rank();
  std::vector<double> pieces;
  auto spec = params_.host().specs().begin();
  const auto specs_end = params_.host().specs().end();
  for (int64_t u = 0; u < partition.units(); ++u) {
    const std::vector<int64_t>& borders = reducer_.norm_borders(u);
    for (size_t p = 0; p + 1 < borders.size(); ++p) {
      double& sum = pieces.emplace_back(0.0);
      const int64_t begin = borders[p];
      const int64_t end = borders[p + 1];
      if (begin == end || begin < partition.begin(u, rank) || end > partition.end(u, rank))
        continue;
      if (mesh_.tp_size() == 1) {
        sum = kernels::SumOfSquares(ctx, reducer_.Summed(begin, end));
        continue;
      }
      while (spec != specs_end && spec->offset + spec->numel <= begin) ++spec;
      for (auto s = spec; s != specs_end && s->offset < end; ++s) {
        const int64_t from = std::max(begin, s->offset);
        const int64_t to = std::min(end, s->offset + s->numel);
        if (s->owner && from < to) sum += kernels::SumOfSquares(ctx, reducer_.Summed(from, to));
      }
    }
  }
  if (!reducer_.rank_independent()) pieces = {std::accumulate(pieces.begin(), pieces.end(), 0.0)};
  SALA_RETURN_IF_ERROR(mesh_.world().AllReduce(std::span<double>(pieces), parallel::Reduce::kSum));
  return std::accumulate(pieces.begin(), pieces.end(), 0.0);
}

StatusOr<UpdateResult> Optimizer::Update(const Context& ctx, double learning_rate,
                                         bool loss_finite) {
  SALA_RETURN_IF_ERROR(reducer_.Finish());
  SALA_ASSIGN_OR_RETURN(const double sum_of_squares, SumOfSquares(ctx));

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
  auto segment = segments_.begin();
  for (int64_t u = 0; u < reducer_.partition().units(); ++u) {
    for (; segment != segments_.end() && segment->spec->unit == u; ++segment) {
      if (!segment->trained) continue;
      options.learning_rate = learning_rate * segment->lr_multiplier;
      options.weight_decay = segment->weight_decay;
      const auto [begin, end] = std::pair(segment->begin, segment->end);
      const Tensor compute = params_.Own(begin, end);
      kernels::AdamWStep(ctx, ctx.cuda() ? Range(master_, begin, end) : compute,
                         reducer_.Summed(begin, end), Range(exp_avg_, begin, end),
                         Range(exp_avg_sq_, begin, end), options, ctx.cuda() ? compute : Tensor());
    }
    if (split()) params_.Share(u, reducer_.partition());
  }
  return result;
}

void Optimizer::AppendSlices(std::vector<TensorSlice>* slices) const {
  if (!split() && mesh_.param_rank() != 0) return;  // copies: the lowest rank writes
  const bool on_device = master_.bytes() > 0;
  const float* avg = on_device ? saved_avg_.data() : static_cast<float*>(exp_avg_.data());
  const float* avg_sq = on_device ? saved_avg_sq_.data() : static_cast<float*>(exp_avg_sq_.data());
  const auto* first = static_cast<float*>(exp_avg_.data());
  for (const Segment& segment : segments_) {
    const model::ParameterSpec& spec = *segment.spec;
    TensorSlice slice;
    slice.name = spec.name;
    slice.shape = spec.global_shape;
    slice.box_offset = spec.box_offset;
    slice.box_shape = spec.box_shape();
    slice.flat_begin = segment.begin - spec.offset;
    slice.flat_end = std::min(segment.end - spec.offset, spec.stored);
    if (!spec.owner || slice.flat_begin >= slice.flat_end) continue;
    slice.kind = TensorKind::kParam;
    slice.data = params_.host().Flat(segment.begin, segment.end).raw();
    slices->push_back(slice);
    if (!segment.trained) continue;
    const auto place = Range(exp_avg_, segment.begin, segment.end).Data<float>() - first;
    slice.kind = TensorKind::kExpAvg;
    slice.data = avg + place;
    slices->push_back(slice);
    slice.kind = TensorKind::kExpAvgSq;
    slice.data = avg_sq + place;
    slices->push_back(slice);
  }
}

Status Optimizer::Load(const Context& ctx, const Checkpoint& checkpoint) {
  std::vector<float> values;
  for (const Segment& segment : segments_) {
    const model::ParameterSpec& spec = *segment.spec;
    const int64_t begin = segment.begin - spec.offset;
    const int64_t end = std::min(segment.end - spec.offset, spec.stored);
    if (!segment.trained || begin >= end) continue;
    if (ctx.cuda()) values.resize(static_cast<size_t>(end - begin));
    for (const auto& [kind, buffer] : {std::pair(TensorKind::kExpAvg, &exp_avg_),
                                       std::pair(TensorKind::kExpAvgSq, &exp_avg_sq_)}) {
      const Tensor to = Range(*buffer, segment.begin, segment.end);
      float* read = ctx.cuda() ? values.data() : to.Data<float>();
      SALA_RETURN_IF_ERROR(checkpoint.ReadBoxF32(spec.name, kind, spec.box_offset, spec.box_shape(),
                                                 begin, end, read));
      if (ctx.cuda()) ctx.gpu->Upload(to.raw(), read, values.size() * sizeof(float));
    }
  }
  return OkStatus();
}

}  // namespace sala::recipes
