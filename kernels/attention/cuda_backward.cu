// Dense attention backward on the GPU: delta, then dq by the tiling of the forward pass, then dk
// and dv by blocks of keys (cuda_key_gradient.cu). S and dP are computed twice, in exchange nothing
// is added to memory that another block adds to. Bound as the forward pass is.
#include "kernels/attention/cuda_backward.h"

#include <algorithm>

#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

using namespace tile;  // NOLINT(google-build-using-namespace)

// D / 8 lanes a row, eight elements each.
template <int D>
__global__ void __launch_bounds__(kThreads)
    DeltaKernel(Input out, Input dout, int heads, const TokenTile* tiles, int tokens,
                float* delta) {
  constexpr int kLanes = D / 8;
  constexpr int kRowsOfBlock = kThreads / kLanes;
  const TokenTile tile = tiles[blockIdx.x];
  const int count = min(tokens, tile.n - tile.first);
  const int64_t token = tile.document + tile.first;
  const int column = static_cast<int>(threadIdx.x) % kLanes * 8;
  for (int begin = 0; begin < count * heads; begin += kRowsOfBlock) {  // the same on all lanes
    const int row = begin + static_cast<int>(threadIdx.x) / kLanes;
    const bool inside = row < count * heads;
    const int64_t t = token + row / heads;
    const int64_t head = row % heads;
    float sum = 0.0F;
    if (inside) {
      float a[8], b[8];
      Load8(out.data + t * out.stride + head * D + column, a);
      Load8(dout.data + t * dout.stride + head * D + column, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(a[i], b[i], sum);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kFullMask, sum, offset);
    }
    if (inside && column == 0) delta[t * heads + head] = sum;
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionQueryGradientKernel(Problem p, Input dout, const float* lse, int64_t lse_stride,
                                 const float* delta, Output dq, const TokenTile* tiles,
                                 int stages) {
  SharedMemory shared;
  auto* memory = shared.Take<Bf16>(stages * KeyRing<D, kDenseKeys>::kStage);
  const TokenTile tile = tiles[blockIdx.x / p.heads];
  const int head = static_cast<int>(blockIdx.x % p.heads);
  KeyRing<D, kDenseKeys> ring(memory, stages, p, tile, head / p.group);
  const int first = tile.first + WarpIndex() * kRows;
  const QueryRows rows = RowsOfTokens(tile, first, head);
  QueryGradientRows<D, kDenseKeys>(
      p, dout, rows, ring, DenseKeyTiles(tile), [](int i) { return i * kDenseKeys; },
      [&](int, int key) { return key < first + kRows && first < tile.n; }, lse, lse_stride, delta,
      dq);
}

// Rows (tokens times heads of the group) of a piece: short enough for a document of 4,096 tokens
// and two key/value heads to fill the device, long enough for its sums to cost little.
constexpr int64_t kRowsOfPiece = 32768;
// Pieces need 64 KiB each for their sums; a document with this many blocks of keys fills the device
// without being cut.
constexpr int64_t kPiecesOfDocument = 1024;

struct HostKeyWork {
  std::vector<KeyTile> tiles;
  std::vector<KeySum> sums;
  int32_t slots = 0;
};

HostKeyWork DenseKeyWork(std::span<const DocumentRange> documents, const Problem& problem,
                         int64_t first_query, int64_t count) {
  HostKeyWork work;
  for (const DocumentRange& document : documents) {
    const DocumentRange queries = PartOf(document, first_query, count);
    const int64_t blocks = CeilDiv(document.length(), kDenseKeys) * problem.kv_heads;
    const int64_t most_pieces = std::max<int64_t>(1, kPiecesOfDocument / blocks);
    const int64_t piece = std::max({int64_t{1}, int64_t{kRowsOfPiece / problem.group},
                                    CeilDiv(document.length(), most_pieces)});
    for (int64_t key = 0; key < document.length(); key += kDenseKeys) {
      for (int32_t head = 0; head < problem.kv_heads; ++head) {
        KeyTile tile;
        tile.document = document.begin;
        tile.n = static_cast<int32_t>(document.length());
        tile.key = static_cast<int32_t>(key);
        tile.head = head;
        tile.run = static_cast<int32_t>(std::max<int64_t>(0, queries.end - key));
        const int64_t begin = std::clamp<int64_t>(queries.begin - key, 0, tile.run);
        const auto pieces =
            static_cast<int32_t>(std::max<int64_t>(1, CeilDiv(tile.run - begin, piece)));
        if (pieces > 1) {
          work.sums.push_back({tile.document, tile.n, tile.key, head, work.slots, pieces, 0});
        }
        for (int32_t i = 0; i < pieces; ++i) {
          tile.first = static_cast<int32_t>(begin + i * piece);
          tile.last = static_cast<int32_t>(std::min<int64_t>(tile.first + piece, tile.run));
          tile.slot = pieces > 1 ? work.slots++ : -1;
          work.tiles.push_back(tile);
        }
      }
    }
  }
  std::stable_sort(work.tiles.begin(), work.tiles.end(), [](const KeyTile& a, const KeyTile& b) {
    return a.last - a.first > b.last - b.first;
  });
  return work;
}

}  // namespace

tile::QueryGradients tile::QueryGradientsOf(const Context& ctx, const Op& op, const ConstTensor& q,
                                            const ConstTensor& out, const ConstTensor& lse,
                                            const ConstTensor& dout, int64_t first_query) {
  const int64_t tokens = q.dim(0);
  const int64_t heads = q.dim(1);
  for (const ConstTensor& x : {out, dout}) CheckDeviceHeads(x, tokens, heads, q.dim(2));
  CheckStatistics(lse, tokens, heads);
  auto* delta = ctx.scratch->New(DType::kF32, {tokens, heads}).Data<float>();
  return {InputOf(op, out, first_query), InputOf(op, dout, first_query),
          DataFromToken<float>(op, lse, first_query), lse.stride(0),
          FromToken(delta, first_query, heads)};
}

void tile::LaunchDelta(const Op& op, const Problem& problem, int64_t d, const QueryGradients& x,
                       const TokenTile* tiles, int64_t count, int tokens) {
  ForHeadSize(d, [&](auto size) {
    op.Launch(DeltaKernel<decltype(size)::value>, dim3(Blocks(count)), dim3(kThreads), 0, x.out,
              x.dout, problem.heads, tiles, tokens, x.delta);
  });
}

void cuda::AttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                             const ConstTensor& v, const ConstTensor& out, const ConstTensor& lse,
                             const ConstTensor& dout, std::span<const DocumentRange> documents,
                             float scale, const Tensor& dq, const Tensor& dk, const Tensor& dv,
                             int64_t first_query) {
  const Op op(ctx, "AttentionBackward", q);
  const Problem problem = ProblemOf(op, q, k, v, scale, first_query);
  CheckDocuments(documents, k.dim(0));
  CheckDeviceHeads(dq, q.dim(0), q.dim(1), q.dim(2));
  for (const Tensor& x : {dk, dv}) CheckDeviceHeads(x, k.dim(0), k.dim(1), q.dim(2));
  const ArenaScope scope(*ctx.scratch);
  const QueryGradients x = QueryGradientsOf(ctx, op, q, out, lse, dout, first_query);
  const std::vector<TokenTile> tiles = DenseTiles(documents, first_query, q.dim(0));
  const auto count = static_cast<int64_t>(tiles.size());
  const TokenTile* device_tiles = UploadScratch(ctx, tiles.data(), count);
  LaunchDelta(op, problem, q.dim(2), x, device_tiles, count, kDenseQueries);
  ForHeadSize(q.dim(2), [&](auto size) {
    constexpr int D = decltype(size)::value;
    constexpr int64_t kStage = KeyRing<D, kDenseKeys>::kStage;
    const int stages = RingStages(op, SharedBytes<Bf16>(kStage), 0);
    op.Launch(AttentionQueryGradientKernel<D>, dim3(Blocks(count * problem.heads)), dim3(kThreads),
              SharedBytes<Bf16>(stages * kStage), problem, x.dout, x.lse, x.lse_stride, x.delta,
              OutputOf(op, dq, first_query), device_tiles, stages);
  });

  const HostKeyWork host = DenseKeyWork(documents, problem, first_query, q.dim(0));
  KeyWork work;
  work.most_tiles = static_cast<int64_t>(host.tiles.size());
  work.most_sums = static_cast<int64_t>(host.sums.size());
  work.slots = host.slots;
  work.tiles = UploadScratch(ctx, host.tiles.data(), work.most_tiles);
  work.sums = UploadScratch(ctx, host.sums.data(), work.most_sums);
  LaunchKeyGradient(ctx, op, problem, q.dim(2), x, work, dk, dv);
}

}  // namespace sala::kernels
