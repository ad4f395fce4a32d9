// Block selection for all tokens, and attention over the selected blocks.
#include <algorithm>
#include <vector>

#include "kernels/attention/block_attention.h"
#include "kernels/cuda_kernels.h"
#include "kernels/sparse_attention/selector.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels {
namespace {

void CheckConfig(const SparseAttentionConfig& config) {
  const std::string problem = SparseConfigProblem(config);
  SALA_CHECK(problem.empty()) << problem;
}

void CheckBlocks(const ConstTensor& blocks, int64_t tokens, int64_t heads,
                 const SparseAttentionConfig& config) {
  SALA_CHECK(blocks.rank() == 3 && blocks.dim(0) == tokens && blocks.dim(1) == heads &&
             blocks.dim(2) == std::max<int64_t>(1, config.free_blocks()) &&
             blocks.dtype() == DType::kI32 && blocks.stride(1) == blocks.dim(2))
      << "blocks " << ShapeText(blocks) << " for " << tokens << " tokens, " << heads
      << " key/value heads, " << config.free_blocks() << " free blocks";
}

// Fine and coarse keys of all documents, in the arena.
struct Compressed {
  Compressed(const Context& ctx, const ConstTensor& k, std::span<const DocumentRange> documents,
             const SparseAttentionConfig& config) {
    int64_t fine_count = 0;
    int64_t coarse_count = 0;
    for (const DocumentRange& document : documents) {
      first_fine.push_back(fine_count);
      first_coarse.push_back(coarse_count);
      fine_count += FineCount(config, document.length());
      coarse_count += CoarseCount(config, document.length());
    }
    fine = ctx.scratch->New(DType::kF32, {fine_count, k.dim(1), k.dim(2)});
    coarse = ctx.scratch->New(DType::kF32, {coarse_count, k.dim(1), k.dim(2)});
    CompressKeys(ctx, k, documents, config, fine, coarse);
  }

  CompressedKeys At(size_t document, int64_t head) const {
    const int64_t d = fine.dim(2);
    return {fine.Row<float>(first_fine[document]) + head * d,
            coarse.Row<float>(first_coarse[document]) + head * d, fine.stride(0)};
  }

  Tensor fine;
  Tensor coarse;
  std::vector<int64_t> first_fine;
  std::vector<int64_t> first_coarse;
};

// The members of a tile's blocks: all tokens for forced blocks, those that chose it for free ones.
// Row 0 of `blocks` is token first_query.
BlockMembers MembersFrom(const SparseAttentionConfig& config, const ConstTensor& blocks,
                         int64_t first_query) {
  return [config, blocks, first_query](const QueryTile& tile, std::span<uint64_t> members) {
    const BlockSpan candidates = CandidateBlocks(config, static_cast<int64_t>(members.size()) - 1);
    std::fill(members.begin(), members.end(), ~uint64_t{0});
    std::fill(members.begin() + candidates.first, members.begin() + candidates.last, uint64_t{0});
    for (int64_t i = 0; i < tile.count; ++i) {
      const int32_t* chosen =
          blocks.Row<int32_t>(tile.document.begin + tile.begin + i - first_query) +
          tile.head * blocks.dim(2);
      for (int64_t f = 0; f < blocks.dim(2) && chosen[f] != kNoBlock; ++f) {
        SALA_CHECK(candidates.first <= chosen[f] && chosen[f] < candidates.last)
            << "block " << chosen[f] << " is not free at position " << tile.begin + i;
        members[static_cast<size_t>(chosen[f])] |= uint64_t{1} << i;
      }
    }
  };
}

}  // namespace

void SelectBlocks(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                  std::span<const DocumentRange> documents, const SparseAttentionConfig& config,
                  float scale, const Tensor& blocks, int64_t first_query) {
  if (ctx.cuda()) {
    return Cuda(ctx).SelectBlocks(ctx, q, k, documents, config, scale, blocks, first_query);
  }
  CheckConfig(config);
  const int64_t heads = k.dim(1);
  const int64_t group = q.dim(1) / heads;
  const int64_t d = q.dim(2);
  CheckHeads(q, q.dim(0), heads * group, d);
  CheckBlocks(blocks, q.dim(0), heads, config);
  CheckDocuments(documents, k.dim(0));
  CheckQueries(first_query, q.dim(0), k.dim(0));
  // The documents that have queries, up to the last of these: no query sees a key behind it.
  std::vector<DocumentRange> seen;
  for (const DocumentRange& document : documents) {
    const DocumentRange queries = PartOf(document, first_query, q.dim(0));
    if (queries.length() > 0) seen.push_back({document.begin, document.begin + queries.end});
  }
  const ArenaScope scope(*ctx.scratch);
  const Compressed compressed(ctx, k, seen, config);

  struct Item {
    size_t document;
    QueryTile tile;
  };
  std::vector<Item> items;
  int64_t longest = 0;
  for (size_t s = 0; s < seen.size(); ++s) {
    longest = std::max(longest, seen[s].length());
    const DocumentRange queries = PartOf(seen[s], first_query, q.dim(0));
    for (int64_t head = 0; head < heads; ++head) {
      ForEachTile(queries, config.block_size, group, [&](int64_t begin, int64_t count) {
        items.push_back({s, {seen[s], head, begin, count}});
      });
    }
  }
  std::vector<SelectorWork> work;
  work.reserve(static_cast<size_t>(ctx.pool->threads()));
  for (int i = 0; i < ctx.pool->threads(); ++i) {
    work.emplace_back(ctx, config, longest, TileTokens(config.block_size, group), group, d);
  }
  ForEachItem(ctx, static_cast<int64_t>(items.size()), [&](int64_t worker, int64_t i) {
    const Item& item = items[static_cast<size_t>(i)];
    SelectorWork& mine = work[static_cast<size_t>(worker)];
    const int64_t row = item.tile.document.begin + item.tile.begin - first_query;
    const int64_t width = group * d;
    for (int64_t t = 0; t < item.tile.count; ++t) {
      std::copy_n(q.Row<float>(row + t) + item.tile.head * width, width,
                  mine.queries() + t * width);
    }
    int32_t* chosen = blocks.Row<int32_t>(row) + item.tile.head * blocks.dim(2);
    SelectTile(config, compressed.At(item.document, item.tile.head), scale, item.tile, group, d,
               mine, chosen, blocks.stride(0));
  });
}

void SparseAttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                            const ConstTensor& v, std::span<const DocumentRange> documents,
                            const SparseAttentionConfig& config, float scale,
                            const ConstTensor& blocks, const Tensor& out, const Tensor& lse,
                            int64_t first_query) {
  if (ctx.cuda()) {
    return Cuda(ctx).SparseAttentionForward(ctx, q, k, v, documents, config, scale, blocks, out,
                                            lse, first_query);
  }
  CheckConfig(config);
  CheckBlocks(blocks, q.dim(0), k.dim(1), config);
  BlockAttentionForward(ctx,
                        {q, k, v, documents, scale, config.block_size,
                         MembersFrom(config, blocks, first_query), first_query},
                        out, lse);
}

void SparseAttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                             const ConstTensor& v, const ConstTensor& out, const ConstTensor& lse,
                             const ConstTensor& dout, std::span<const DocumentRange> documents,
                             const SparseAttentionConfig& config, float scale,
                             const ConstTensor& blocks, const Tensor& dq, const Tensor& dk,
                             const Tensor& dv, int64_t first_query) {
  if (ctx.cuda()) {
    return Cuda(ctx).SparseAttentionBackward(ctx, q, k, v, out, lse, dout, documents, config, scale,
                                             blocks, dq, dk, dv, first_query);
  }
  CheckConfig(config);
  CheckBlocks(blocks, q.dim(0), k.dim(1), config);
  BlockAttentionBackward(ctx,
                         {q, k, v, documents, scale, config.block_size,
                          MembersFrom(config, blocks, first_query), first_query},
                         out, lse, dout, dq, dk, dv);
}

void SparseAttentionDecode(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                           const ConstTensor& v, const SparseAttentionConfig& config, float scale,
                           const Tensor& out) {
  CheckConfig(config);
  const int64_t n = k.dim(0);
  const int64_t heads = k.dim(1);
  const int64_t group = q.dim(0) / heads;
  const int64_t d = q.dim(1);
  const int64_t width = std::max<int64_t>(1, config.free_blocks());
  const ArenaScope scope(*ctx.scratch);
  const DocumentRange document = {0, n};
  const Compressed compressed(ctx, k, {&document, 1}, config);
  // One row of chosen blocks per head; the only query is token n - 1.
  auto* chosen = static_cast<int32_t*>(
      ctx.scratch->Allocate(static_cast<size_t>(heads * width) * sizeof(int32_t)));
  SelectorWork work(ctx, config, n, 1, group, d);
  for (int64_t head = 0; head < heads; ++head) {
    std::copy_n(q.Data<float>() + head * group * d, group * d, work.queries());
    SelectTile(config, compressed.At(0, head), scale, {document, head, n - 1, 1}, group, d, work,
               chosen + head * width, width);
  }
  const ConstTensor one(q.Data<float>(), {1, q.dim(0), d});
  const ConstTensor blocks(chosen, {1, heads, width});
  BlockAttentionDecode(
      ctx, {one, k, v, {}, scale, config.block_size, MembersFrom(config, blocks, n - 1), n - 1},
      out);
}

}  // namespace sala::kernels
