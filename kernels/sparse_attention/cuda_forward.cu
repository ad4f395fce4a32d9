// Sparse attention forward on the GPU. A block takes eight consecutive tokens of one key/value head
// and walks over the union of their blocks (cuda_blocks.h): keys and values of a block are staged
// once and used by every token that attends to it, which saves most of the traffic between L2 cache
// and shared memory that one block per token would have; a warp whose token did not choose the
// block waits at the barrier. Bound by shared memory: a warp reads a block of keys for 16 rows, 16
// operations a byte. Neighbouring tiles run together and find each other's blocks in the L2 cache.
#include "kernels/cuda_kernels.h"
#include "kernels/sparse_attention/cuda_blocks.h"

namespace sala::kernels {
namespace {

using namespace tile;  // NOLINT(google-build-using-namespace)

template <int D, int kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    SparseForwardKernel(Problem p, SparseShape z, ChosenBlocks blocks, Output out, float* lse,
                        int64_t lse_stride, const TokenTile* tiles, WalkSize walk_size,
                        int stages) {
  SharedMemory shared;
  auto* memory = shared.Take<Bf16>(stages * KeyRing<D, kKeys>::kStage);
  auto* masks = shared.Take<uint32_t>(walk_size.mask_words);
  auto* walk = shared.Take<int32_t>(walk_size.entries);
  auto* counts = shared.Take<int32_t>(kWarps);
  const TokenTile tile = tiles[blockIdx.x / p.kv_heads];
  const int kv_head = static_cast<int>(blockIdx.x % p.kv_heads);
  const int32_t* chosen =
      blocks.data + (tile.document + tile.first) * blocks.stride + int64_t{kv_head} * z.width;
  const int length = BuildWalk<kKeys>(z, chosen, blocks.stride, tile, masks, walk, counts);
  KeyRing<D, kKeys> ring(memory, stages, p, tile, kv_head);
  const int position = tile.first + WarpIndex();
  const QueryRows rows = RowsOfHeads(tile, position, kv_head, p.group);
  AttendRows<D, kKeys>(
      p, rows, ring, length, [walk](int i) { return (walk[i] >> 8) * kKeys; },
      [&](int i, int key) {
        return (walk[i] >> WarpIndex() & 1) != 0 && key <= position && position < tile.n;
      },
      out, lse, lse_stride);
}

}  // namespace

void cuda::SparseAttentionForward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                                  const ConstTensor& v, std::span<const DocumentRange> documents,
                                  const SparseAttentionConfig& config, float scale,
                                  const ConstTensor& blocks, const Tensor& out, const Tensor& lse,
                                  int64_t first_query) {
  const Op op(ctx, "SparseAttentionForward", q);
  const Problem problem = ProblemOf(op, q, k, v, scale, first_query);
  CheckDocuments(documents, k.dim(0));
  CheckDeviceHeads(out, q.dim(0), q.dim(1), q.dim(2));
  CheckStatistics(lse, q.dim(0), q.dim(1));
  const SparseShape shape = SparseShapeOf(config, problem, blocks, q.dim(0));
  const int tile_keys = KeysOfTile(config);
  const std::vector<TokenTile> tiles = SparseTiles(documents, config, first_query, q.dim(0));
  const WalkSize walk = WalkSizeOf(shape, tile_keys, tiles);
  const ArenaScope scope(*ctx.scratch);
  const auto count = static_cast<int64_t>(tiles.size());
  const TokenTile* device_tiles = UploadScratch(ctx, tiles.data(), count);
  ForTileShape(q.dim(2), tile_keys, [&](auto size, auto keys) {
    constexpr int D = decltype(size)::value;
    constexpr int kKeys = decltype(keys)::value;
    constexpr int64_t kStage = KeyRing<D, kKeys>::kStage;
    const int stages = RingStages(op, SharedBytes<Bf16>(kStage), walk.bytes());
    op.Launch(SparseForwardKernel<D, kKeys>, dim3(Blocks(count * problem.kv_heads)), dim3(kThreads),
              SharedBytes<Bf16>(stages * kStage) + walk.bytes(), problem, shape,
              ChosenBlocksOf(op, blocks, first_query), OutputOf(op, out, first_query),
              DataFromToken<float>(op, lse, first_query), lse.stride(0), device_tiles, walk,
              stages);
  });
}

}  // namespace sala::kernels
