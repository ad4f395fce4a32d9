// Dense attention forward on the GPU. A block takes 128 queries of one query head, 16 a warp, and
// walks over tiles of 64 keys from the start of the document to its diagonal; keys and values come
// through a ring of asynchronous copies. Bound by the tensor cores, and by shared memory: a warp
// reads all of a tile for its 16 rows, 16 operations a byte. Longest walks first, so that the last
// blocks to finish are short ones; the heads of a tile follow each other and meet in the L2 cache.
//
// Tiles follow positions in the document, warps those that are multiples of 16, so a row's bits
// depend on its own document alone, and not on the range of queries that it comes with.
#include "kernels/attention/cuda_backward.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

using namespace tile;  // NOLINT(google-build-using-namespace)

template <int D>
__global__ void __launch_bounds__(kThreads, 1)
    AttentionForwardKernel(Problem p, Output out, float* lse, int64_t lse_stride,
                           const TokenTile* tiles, int stages) {
  SharedMemory shared;
  auto* memory = shared.Take<Bf16>(stages * KeyRing<D, kDenseKeys>::kStage);
  const TokenTile tile = tiles[blockIdx.x / p.heads];
  const int head = static_cast<int>(blockIdx.x % p.heads);
  KeyRing<D, kDenseKeys> ring(memory, stages, p, tile, head / p.group);
  const int first = tile.first + WarpIndex() * kRows;
  const QueryRows rows = RowsOfTokens(tile, first, head);
  AttendRows<D, kDenseKeys>(
      p, rows, ring, DenseKeyTiles(tile), [](int i) { return i * kDenseKeys; },
      [&](int, int key) { return key < first + kRows && first < tile.n; }, out, lse, lse_stride);
}

}  // namespace

std::vector<TokenTile> tile::DenseTiles(std::span<const DocumentRange> documents,
                                        int64_t first_query, int64_t count) {
  std::vector<TokenTile> tiles;
  for (const DocumentRange& document : documents) {
    ForEachTokenTile(document, PartOf(document, first_query, count), kRows, kDenseQueries,
                     [&tiles](const TokenTile& tile) { tiles.push_back(tile); });
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const TokenTile& a, const TokenTile& b) {
    return DenseKeyTiles(a) > DenseKeyTiles(b);
  });
  return tiles;
}

void cuda::AttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                            const ConstTensor& v, std::span<const DocumentRange> documents,
                            float scale, const Tensor& out, const Tensor& lse,
                            int64_t first_query) {
  const Op op(ctx, "AttentionForward", q);
  const Problem problem = ProblemOf(op, q, k, v, scale, first_query);
  CheckDocuments(documents, k.dim(0));
  CheckDeviceHeads(out, q.dim(0), q.dim(1), q.dim(2));
  CheckStatistics(lse, q.dim(0), q.dim(1));
  const ArenaScope scope(*ctx.scratch);
  const std::vector<TokenTile> tiles = DenseTiles(documents, first_query, q.dim(0));
  const auto count = static_cast<int64_t>(tiles.size());
  const TokenTile* device_tiles = UploadScratch(ctx, tiles.data(), count);
  ForHeadSize(q.dim(2), [&](auto size) {
    constexpr int D = decltype(size)::value;
    constexpr int64_t kStage = KeyRing<D, kDenseKeys>::kStage;
    const int stages = RingStages(op, SharedBytes<Bf16>(kStage), 0);
    op.Launch(AttentionForwardKernel<D>, dim3(Blocks(count * problem.heads)), dim3(kThreads),
              SharedBytes<Bf16>(stages * kStage), problem, OutputOf(op, out, first_query),
              DataFromToken<float>(op, lse, first_query), lse.stride(0), device_tiles, stages);
  });
}

}  // namespace sala::kernels
