#include "model/spread.h"

#include <algorithm>
#include <numbers>
#include <numeric>

#include "core/check.h"
#include "core/elementary.h"
#include "kernels/tensor_ops/tensor_ops.h"

namespace sala::model {
namespace {

using parallel::OrThrow;

// On a dry device there is nothing to exchange.
bool Dry(const Context& ctx) { return ctx.cuda() && ctx.gpu->options().dry; }

Tensor FlatView(const Tensor& x) { return x.Reshape({x.numel()}); }

// Rows of each rank -> elements of each rank.
std::vector<int64_t> Counts(const std::vector<int64_t>& borders, int64_t width) {
  std::vector<int64_t> counts;
  for (size_t r = 0; r + 1 < borders.size(); ++r)
    counts.push_back((borders[r + 1] - borders[r]) * width);
  return counts;
}

}  // namespace

Spread::Spread(parallel::Mesh& mesh) : mesh_(&mesh) {
  exchange_.rank = mesh.tp_rank();
  exchange_.ranks = mesh.tp_size();
  exchange_.gather = [&mesh](const Context& ctx, const ConstTensor& mine, const Tensor& all) {
    if (Dry(ctx)) return;
    const std::vector<int64_t> counts(static_cast<size_t>(mesh.tp_size()), mine.numel());
    OrThrow(mesh.tp_group().AllGather(mine, counts, FlatView(all)));
  };
}

// Ranges of many tokens begin at multiples of 16, which products prefer.
TokenShare ShareTokens(int64_t total, int cp_rank, int cp_size, int tp_rank, int tp_size) {
  TokenShare share;
  share.total = total;
  const int64_t alignment = total >= int64_t{64} * cp_size * tp_size ? 16 : 1;
  share.cp_borders = parallel::FlatPartition::Even(total, cp_size, alignment).begin;
  share.begin = share.cp_borders[static_cast<size_t>(cp_rank)];
  share.end = share.cp_borders[static_cast<size_t>(cp_rank) + 1];
  share.tp_borders = parallel::FlatPartition::Even(share.tokens(), tp_size, 1).begin;
  share.part_begin = share.tp_borders[static_cast<size_t>(tp_rank)];
  share.part_end = share.tp_borders[static_cast<size_t>(tp_rank) + 1];
  return share;
}

TokenShare Spread::Share(int64_t total) const {
  return ShareTokens(total, cp_rank(), cp_size(), tp_rank(), tp_size());
}

Tensor Spread::Gather(const Context& ctx, Arena& arena, const TokenShare& share,
                      const Tensor& part) const {
  if (tp_size() == 1) return part;
  SALA_CHECK(part.dim(0) == share.part()) << ShapeText(part);
  const Tensor all = arena.New(part.dtype(), {share.tokens(), part.dim(1)});
  if (Dry(ctx)) return all;
  OrThrow(mesh_->tp_group().AllGather(ConstTensor(FlatView(part)),
                                      Counts(share.tp_borders, part.dim(1)), FlatView(all)));
  return all;
}

void Spread::Sum(const Context& ctx, Arena& arena, const TokenShare& share, const Tensor& terms,
                 const Tensor& part, kernels::Write write) const {
  SALA_CHECK(tp_size() > 1) << ShapeText(terms);
  const ArenaScope scope(arena);
  const int64_t width = terms.dim(1);
  Tensor wide = terms;
  if (terms.dtype() != DType::kF32) {
    wide = arena.New(DType::kF32, {terms.dim(0), width});
    kernels::Cast(ctx, terms, wide);
  }
  const bool direct = write == kernels::Write::kOverwrite && part.dtype() == DType::kF32;
  const Tensor sum = direct ? part : arena.New(DType::kF32, {share.part(), width});
  if (!Dry(ctx)) {
    OrThrow(mesh_->tp_group().ReduceScatterSum(ConstTensor(FlatView(wide)),
                                               Counts(share.tp_borders, width), FlatView(sum)));
  }
  if (direct) return;
  if (write == kernels::Write::kOverwrite) {
    kernels::Cast(ctx, sum, part);
    return;
  }
  Tensor term = sum;
  if (part.dtype() != DType::kF32) {
    term = arena.New(part.dtype(), {share.part(), width});
    kernels::Cast(ctx, sum, term);
  }
  kernels::Add(ctx, term, part);
}

const kernels::RankExchange* Spread::exchange() const {
  return tp_size() == 1 ? nullptr : &exchange_;
}

Tensor Spread::GatherGroup(const Context& ctx, Arena& arena, int64_t kv_heads,
                           const Tensor& x) const {
  const auto ranks = static_cast<int64_t>(tp_size()) / kv_heads;
  if (ranks <= 1) return x;
  const int64_t tokens = x.dim(0);
  const int64_t width = x.dim(1);
  const Tensor all = arena.New(x.dtype(), {tokens, ranks * width});
  const ArenaScope scope(arena);
  const Tensor rows = arena.New(x.dtype(), {ranks * tokens, width});
  if (Dry(ctx)) return all;
  const auto group = mesh_->TensorSubgroup(static_cast<int>(ranks), /*background=*/false);
  OrThrow(group.status());
  OrThrow((*group)->AllGather(ConstTensor(FlatView(x)),
                              std::vector<int64_t>(static_cast<size_t>(ranks), x.numel()),
                              FlatView(rows)));
  for (int64_t r = 0; r < ranks; ++r) {
    kernels::CopyColumns(ctx, rows.Rows(r * tokens, (r + 1) * tokens),
                         all.Columns(r * width, (r + 1) * width));
  }
  return all;
}

Tensor Spread::GatherContext(const Context& ctx, Arena& arena, const TokenShare& share,
                             const Tensor& x) const {
  if (cp_size() == 1) return x;
  const Tensor all = arena.New(x.dtype(), {share.total, x.dim(1)});
  if (Dry(ctx)) return all;
  OrThrow(mesh_->cp_group().AllGather(ConstTensor(FlatView(x)), Counts(share.cp_borders, x.dim(1)),
                                      FlatView(all)));
  return all;
}

Tensor Spread::SumContext(const Context& ctx, Arena& arena, const TokenShare& share,
                          const Tensor& terms) const {
  const int64_t width = terms.dim(1);
  const Tensor result = arena.New(ctx.activation(), {share.tokens(), width});
  const ArenaScope scope(arena);
  const Tensor sum =
      result.dtype() == DType::kF32 ? result : arena.New(DType::kF32, {share.tokens(), width});
  if (!Dry(ctx)) {
    OrThrow(mesh_->cp_group().ReduceScatterSum(ConstTensor(FlatView(terms)),
                                               Counts(share.cp_borders, width), FlatView(sum)));
  }
  if (result.dtype() != DType::kF32) kernels::Cast(ctx, sum, result);
  return result;
}

int64_t StateWindow(const TokenShare& share, const std::vector<float>& slopes) {
  const double cutoff = 25 * std::numbers::ln2;
  const double slope = slopes.empty() ? 0 : *std::min_element(slopes.begin(), slopes.end());
  const auto ranges = static_cast<int64_t>(share.cp_borders.size()) - 1;
  int64_t window = std::min<int64_t>(1, ranges - 1);
  for (int64_t r = 1; r < ranges; ++r) {
    for (int64_t s = window; s < r; ++s) {
      const int64_t passed =
          share.cp_borders[static_cast<size_t>(r)] - share.cp_borders[static_cast<size_t>(r - s)];
      if (slope * static_cast<double>(passed) >= cutoff) break;
      window = s + 1;
    }
  }
  return window;
}

Tensor Spread::EnteringState(const Context& ctx, Arena& arena, const TokenShare& share,
                             const std::vector<char>& survives, const std::vector<float>& slopes,
                             int64_t window, bool backwards, const Tensor& own) const {
  const int64_t heads = own.dim(0);
  const int64_t size = own.dim(1) * own.dim(2);
  const Tensor sum = arena.NewZeroed(DType::kF32, {heads, own.dim(1), own.dim(2)});
  const ArenaScope scope(arena);
  const Tensor from = arena.New(DType::kF32, {heads, own.dim(1), own.dim(2)});
  std::vector<float> total, term;
  int64_t tokens = 0;  // passed on the way from the sender
  bool alive = true;
  for (int64_t s = 1; s <= window; ++s) {
    const int by = static_cast<int>(backwards ? -s : s);
    if (!Dry(ctx)) OrThrow(mesh_->cp_group().Shift(ConstTensor(own), from, by));
    const int sender = cp_rank() - by;
    if (sender < 0 || sender >= cp_size() || !alive || Dry(ctx)) continue;
    term.resize(static_cast<size_t>(heads * size));
    total.resize(term.size(), 0.0F);
    const size_t bytes = term.size() * sizeof(float);
    if (ctx.cuda()) {
      ctx.gpu->Download(term.data(), from.raw(), bytes);
    } else {
      std::copy_n(from.Data<float>(), term.size(), term.begin());
    }
    for (int64_t h = 0; h < heads; ++h) {
      const auto factor = static_cast<float>(PortableExp(
          -static_cast<double>(slopes[static_cast<size_t>(h)]) * static_cast<double>(tokens)));
      for (int64_t i = h * size; i < (h + 1) * size; ++i)
        total[static_cast<size_t>(i)] += factor * term[static_cast<size_t>(i)];
    }
    const auto passed = static_cast<size_t>(sender);
    tokens += share.cp_borders[passed + 1] - share.cp_borders[passed];
    alive = survives[passed] != 0;
  }
  if (total.empty()) return sum;
  if (ctx.cuda()) {
    ctx.gpu->Upload(sum.raw(), total.data(), total.size() * sizeof(float));
  } else {
    std::copy(total.begin(), total.end(), sum.Data<float>());
  }
  return sum;
}

}  // namespace sala::model
