#include "recipes/gradient_reducer.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "kernels/tensor_ops/tensor_ops.h"

namespace sala::recipes {
namespace {

// At most 256 pieces a unit, so that all are one short message and a shard is hardly larger than
// another; a multiple of the alignment of shards.
int64_t NormPiece(int64_t n) { return std::max<int64_t>(1, (n + 4095) / 4096) * 16; }

}  // namespace

parallel::UnitPartition GradientPartition(const std::vector<int64_t>& borders, int ranks,
                                          bool rank_independent) {
  std::vector<int64_t> alignments;
  for (size_t u = 0; rank_independent && u + 1 < borders.size(); ++u)
    alignments.push_back(NormPiece(borders[u + 1] - borders[u]));
  return {borders, ranks, alignments};
}

std::vector<int64_t> NormBorders(const parallel::UnitPartition& partition, int64_t unit) {
  std::vector<int64_t> borders;
  const int64_t end = partition.unit_end(unit);
  const int64_t piece = NormPiece(partition.unit_size(unit));
  for (int64_t at = partition.unit_begin(unit); at < end; at += piece) borders.push_back(at);
  borders.push_back(end);
  return borders;
}

std::vector<std::vector<CopyRange>> CopyRanges(const std::vector<model::ParameterSpec>& specs,
                                               int64_t units) {
  std::vector<std::vector<CopyRange>> ranges(static_cast<size_t>(units));
  for (const model::ParameterSpec& spec : specs) {
    if (spec.copies == 1) continue;
    std::vector<CopyRange>& unit = ranges[static_cast<size_t>(spec.unit)];
    // Gaps between tensors are zero on all ranks.
    const bool next = !unit.empty() && unit.back().copies == spec.copies &&
                      spec.offset - unit.back().end < 16 && spec.offset >= unit.back().end;
    if (next) {
      unit.back().end = spec.offset + spec.numel;
    } else {
      unit.push_back({spec.offset, spec.offset + spec.numel, spec.copies});
    }
  }
  return ranges;
}

GradientReducer::GradientReducer(const Context& ctx, const model::ParameterStore& layout,
                                 parallel::Mesh& mesh, bool rank_independent)
    : ctx_(ctx),
      mesh_(mesh),
      by_hand_(rank_independent),
      partition_(GradientPartition(layout.unit_borders(), mesh.param_size(), rank_independent)) {
  SALA_CHECK(!rank_independent || mesh.zero_stage() <= 1) << "ZeRO stage " << mesh.zero_stage();
  const model::Placement whole = sliced() ? model::Placement::Slots() : model::Placement();
  store_ = model::ParameterStore(layout.specs(), DType::kF32, ctx.gpu, whole);
  if (sliced() || !alone()) {
    shard_ = model::ParameterStore(layout.specs(), DType::kF32, ctx.gpu,
                                   model::Placement::Shard(partition_, mesh.param_rank()));
  }
  const int rank = mesh.param_rank();
  for (int64_t u = 0; u < partition_.units(); ++u) {
    norm_borders_.push_back(rank_independent ? NormBorders(partition_, u)
                                             : std::vector<int64_t>{partition_.begin(u, rank),
                                                                    partition_.end(u, rank)});
  }
  for (const std::vector<CopyRange>& ranges : CopyRanges(store_.specs(), partition_.units())) {
    std::vector<Copies>& unit = copies_.emplace_back();
    for (const CopyRange& range : ranges) {
      parallel::Communicator* group = &mesh.background_tp_group();
      if (range.copies < mesh.tp_size()) {
        auto part = mesh.TensorSubgroup(static_cast<int>(range.copies), /*background=*/true);
        parallel::OrThrow(part.status());
        group = *part;
      }
      unit.push_back({range.begin, range.end, group});
    }
  }
  ReserveWork();
  pending_.assign(static_cast<size_t>(partition_.units()), 0);
  in_slot_.assign(model::kSlotCount, -1);
  pool_ = std::make_unique<ThreadPool>(1);
  store_.set_hooks(this);
}

// Before the first step, so that memory that is planned counts it.
void GradientReducer::ReserveWork() {
  int64_t term = 0;
  int64_t work = 0;
  for (int64_t u = 0; u < partition_.units(); ++u) {
    if (sliced() && !alone())
      term = std::max(term, partition_.counts(u)[static_cast<size_t>(mesh_.param_rank())]);
    for (const Copies& copies : copies_[static_cast<size_t>(u)])
      work = std::max(work, parallel::AllReduceWork(*copies.group, copies.end - copies.begin));
  }
  term_ = Buffer(static_cast<size_t>(term) * sizeof(float), ctx_.gpu);
  work_ = Buffer(static_cast<size_t>(work) * sizeof(float), ctx_.gpu);
}

GradientReducer::~GradientReducer() { mesh_.queue().Drain(); }

void GradientReducer::BeginStep() {
  std::fill(pending_.begin(), pending_.end(), 0);
  std::fill(in_slot_.begin(), in_slot_.end(), -1);
  last_ = false;
  if (sliced()) {
    shard_.Zero();
  } else {
    store_.Zero();
  }
}

void GradientReducer::BeginMicroBatch(bool last) { last_ = last; }

void GradientReducer::Enter(int64_t unit) {
  if (!sliced() || mesh_.planning()) return;
  const int64_t layers = model::LayersOf(partition_.units());
  int64_t& held = in_slot_[static_cast<size_t>(model::SlotOf(unit, layers))];
  if (held == unit && pending_[static_cast<size_t>(unit)] == 0) return;  // goes on: a tied head
  if (held >= 0) parallel::OrThrow(mesh_.queue().Wait(pending_[static_cast<size_t>(held)]));
  held = unit;
  pending_[static_cast<size_t>(unit)] = 0;
  const Tensor all = store_.Flat(partition_.unit_begin(unit), partition_.unit_end(unit));
  if (ctx_.cuda()) {
    ctx_.gpu->Zero(all.raw(), static_cast<size_t>(all.numel()) * sizeof(float));
  } else {
    std::fill_n(all.Data<float>(), all.numel(), 0.0F);
  }
}

void GradientReducer::Leave(int64_t unit) {
  if (mesh_.planning()) return;
  if (sliced() || (last_ && !by_hand_)) Submit(unit);
}

void GradientReducer::Submit(int64_t unit) {
  if (partition_.unit_size(unit) == 0) return;
  pending_[static_cast<size_t>(unit)] = mesh_.queue().Submit([this, unit] { return Reduce(unit); });
}

Status GradientReducer::SumCopies(int64_t unit) {
  for (const Copies& copies : copies_[static_cast<size_t>(unit)]) {
    SALA_RETURN_IF_ERROR(parallel::AllReduceSum(
        *copies.group, store_.Flat(copies.begin, copies.end), ctx_.gpu, &work_));
  }
  return OkStatus();
}

Status GradientReducer::Reduce(int64_t unit) {
  SALA_RETURN_IF_ERROR(SumCopies(unit));
  parallel::Communicator& group = mesh_.background_param_group();
  const Tensor all = store_.Flat(partition_.unit_begin(unit), partition_.unit_end(unit));
  const int rank = mesh_.param_rank();
  const int64_t begin = partition_.begin(unit, rank);
  const int64_t end = partition_.end(unit, rank);
  if (!sliced()) {
    if (alone()) return OkStatus();
    const Tensor mine = shard_.Flat(begin, end);
    SALA_RETURN_IF_ERROR(group.ReduceScatterSum(ConstTensor(all), partition_.counts(unit), mine));
    if (mesh_.zero_stage() >= 1) return OkStatus();
    return group.AllGather(ConstTensor(mine), partition_.counts(unit), all);
  }
  Tensor term = all;
  if (!alone()) {
    term = Tensor(term_.data(), DType::kF32, {end - begin}, all.device());
    SALA_RETURN_IF_ERROR(group.ReduceScatterSum(ConstTensor(all), partition_.counts(unit), term));
  }
  Context beside = mesh_.Beside(ctx_);
  beside.pool = pool_.get();
  kernels::Add(beside, term, shard_.Flat(begin, end));
  return OkStatus();
}

Status GradientReducer::Finish() {
  for (int64_t u = partition_.units() - 1; u >= 0; --u) {
    if (!sliced() && pending_[static_cast<size_t>(u)] == 0) Submit(u);
  }
  return mesh_.queue().WaitAll();
}

Tensor GradientReducer::Summed(int64_t begin, int64_t end) {
  const bool in_store = !sliced() && (alone() || mesh_.zero_stage() == 0);
  return in_store ? store_.Flat(begin, end) : shard_.Flat(begin, end);
}

}  // namespace sala::recipes
