#include "recipes/plan_scratch.h"

#include <algorithm>

#include "kernels/attention/block_attention.h"
#include "kernels/gemm/serial.h"

namespace sala::recipes {
namespace {

using kernels::DocumentRange;
using model::TokenShare;

constexpr int64_t kRowGrain = 32;  // rows of one partial sum (kernels/common/tensor_check.h)

int64_t CeilDiv(int64_t n, int64_t d) { return (n + d - 1) / d; }

}  // namespace

void GemmScratch(PassContext& ctx, int64_t m, int64_t n, int64_t k) {
  if (m == 0 || n == 0) return;
  if (ctx.cuda()) {
    // The library's, as for compute capability 9 (kernels/gemm/cuda/cublaslt.cc).
    const MeterScope scope(ctx.scratch);
    ctx.scratch.New(int64_t{64} << 20);
    return;
  }
  const int64_t threads = ctx.input.threads;
  const bool cut_rows = m >= n;
  const int64_t length = cut_rows ? m : n;
  constexpr int64_t kSmallest = 96;
  constexpr int64_t kPiecesPerThread = 4;
  const int64_t piece =
      threads == 1
          ? length
          : std::max(kSmallest,
                     CeilDiv(CeilDiv(length, threads * kPiecesPerThread), kSmallest) * kSmallest);
  const int64_t workers = std::min(threads, CeilDiv(length, piece));
  const MeterScope scope(ctx.scratch);
  ctx.scratch.New(workers *
                  kernels::GemmSerialWorkspace(cut_rows ? piece : m, cut_rows ? n : piece, k) *
                  kFloat);
}

bool AllTrained(const PlanInput& input) {
  return input.phase != PlanPhase::kDistil || input.trainable == HaloTrainable::kAll;
}

void ProductScratch(PassContext& ctx, int64_t tokens, int64_t out, int64_t in, bool trained) {
  GemmScratch(ctx, tokens, out, in);
  GemmScratch(ctx, tokens, in, out);
  if (trained) GemmScratch(ctx, out, in, tokens);
}

void RowSumsScratch(PassContext& ctx, int64_t rows, int64_t width) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  ctx.scratch.New(CeilDiv(rows, kRowGrain) * width * kFloat);
}

void GatherScratch(PassContext& ctx, int64_t n) {
  ctx.scratch.New(n * kFloat);
  ctx.scratch.New(n * ctx.tp_ranks * kFloat);
}

void AttentionScratch(PassContext& ctx, const Heads& g, const std::vector<DocumentRange>& documents,
                      const TokenShare& share, int64_t block, bool backward) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  const int64_t group = g.heads / g.kv_heads;
  const int64_t rows = kernels::TileTokens(block, group) * group;
  int64_t blocks = 0;
  int64_t most = 1;
  for (const DocumentRange& document : documents) {
    const DocumentRange queries = kernels::PartOf(document, share.begin, share.tokens());
    const int64_t n = queries.length() == 0 ? 0 : CeilDiv(queries.end, block);
    blocks += n;
    most = std::max(most, n);
  }
  // Keys, and backwards values too, once more transposed.
  for (int i = 0; i < (backward ? 2 : 1); ++i)
    ctx.scratch.New(blocks * g.kv_heads * block * g.d * kFloat);
  const int64_t gemm = std::max({kernels::GemmSerialWorkspace(rows, block, g.d),
                                 kernels::GemmSerialWorkspace(rows, g.d, block),
                                 kernels::GemmSerialWorkspace(block, g.d, rows)});
  for (int64_t thread = 0; thread < ctx.input.threads; ++thread) {
    for (int i = 0; i < (backward ? 3 : 2); ++i) ctx.scratch.New(rows * g.d * kFloat);
    for (int i = 0; i < (backward ? 2 : 1); ++i) ctx.scratch.New(rows * block * kFloat);
    for (int i = 0; i < 2; ++i) ctx.scratch.New(rows * kFloat);
    ctx.scratch.New(gemm * kFloat);
    ctx.scratch.New(most * 8);
  }
}

void SelectionScratch(PassContext& ctx, const Heads& g, const std::vector<DocumentRange>& documents,
                      const TokenShare& share, const kernels::SparseAttentionConfig& config,
                      int64_t group) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  int64_t fine = 0, coarse = 0, longest = 0;
  for (const DocumentRange& document : documents) {
    const int64_t n = kernels::PartOf(document, share.begin, share.tokens()).end;
    fine += kernels::FineCount(config, n);
    coarse += kernels::CoarseCount(config, n);
    longest = std::max(longest, n);
  }
  ctx.scratch.New(fine * g.kv_width() * kFloat);
  ctx.scratch.New(coarse * g.kv_width() * kFloat);
  constexpr int64_t kKeyTile = 128;
  const int64_t tokens = kernels::TileTokens(config.block_size, group);
  const int64_t rows = tokens * group;
  for (int64_t thread = 0; thread < ctx.input.threads; ++thread) {
    ctx.scratch.New(rows * g.d * kFloat);
    ctx.scratch.New(rows * kKeyTile * kFloat);
    ctx.scratch.New(rows * kFloat);
    ctx.scratch.New(rows * kFloat);
    ctx.scratch.New(tokens * (kernels::FineCount(config, longest) + 1) * kFloat);
    ctx.scratch.New(kernels::GemmSerialWorkspace(rows, kKeyTile, g.d) * kFloat);
  }
}

void LightningScratch(PassContext& ctx, const Heads& g) {
  if (ctx.cuda()) return;
  const MeterScope scope(ctx.scratch);
  constexpr int64_t kChunk = 64;
  const int64_t side = std::max(kChunk, g.d);
  for (int64_t thread = 0; thread < ctx.input.threads; ++thread) {
    ctx.scratch.New(kChunk * g.d * kFloat);
    ctx.scratch.New(kChunk * kChunk * kFloat);
    ctx.scratch.New(g.d * g.d * kFloat);
    ctx.scratch.New(kernels::GemmSerialWorkspace(side, side, side) * kFloat);
  }
}

}  // namespace sala::recipes
