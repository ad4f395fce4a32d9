// Sparse attention backward on the GPU: delta; dq by the walks of the forward pass; the inverse
// index; dk and dv by blocks of keys (kernels/attention/cuda_key_gradient.cu). No atomics on
// floating-point numbers: results repeat bit for bit. dq is bound by shared memory as the forward
// pass is, with three products to its two; dk and dv gather whole tokens, 128 operations a byte.
#include "kernels/cuda_kernels.h"
#include "kernels/sparse_attention/cuda_index.h"

namespace sala::kernels {
namespace {

using namespace tile;  // NOLINT(google-build-using-namespace)

template <int D, int kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    SparseQueryGradientKernel(Problem p, Input dout, SparseShape z, ChosenBlocks blocks,
                              const float* lse, int64_t lse_stride, const float* delta, Output dq,
                              const TokenTile* tiles, WalkSize walk_size, int stages) {
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
  QueryGradientRows<D, kKeys>(
      p, dout, rows, ring, length, [walk](int i) { return (walk[i] >> 8) * kKeys; },
      [&](int i, int key) {
        return (walk[i] >> WarpIndex() & 1) != 0 && key <= position && position < tile.n;
      },
      lse, lse_stride, delta, dq);
}

}  // namespace

void cuda::SparseAttentionBackward(const Context& ctx, const ConstTensor& q, const ConstTensor& k,
                                   const ConstTensor& v, const ConstTensor& out,
                                   const ConstTensor& lse, const ConstTensor& dout,
                                   std::span<const DocumentRange> documents,
                                   const SparseAttentionConfig& config, float scale,
                                   const ConstTensor& blocks, const Tensor& dq, const Tensor& dk,
                                   const Tensor& dv, int64_t first_query) {
  const Op op(ctx, "SparseAttentionBackward", q);
  const Problem problem = ProblemOf(op, q, k, v, scale, first_query);
  CheckDocuments(documents, k.dim(0));
  CheckDeviceHeads(dq, q.dim(0), q.dim(1), q.dim(2));
  for (const Tensor& x : {dk, dv}) CheckDeviceHeads(x, k.dim(0), k.dim(1), q.dim(2));
  const SparseShape shape = SparseShapeOf(config, problem, blocks, q.dim(0));
  const int tile_keys = KeysOfTile(config);
  const std::vector<TokenTile> tiles = SparseTiles(documents, config, first_query, q.dim(0));
  const WalkSize walk = WalkSizeOf(shape, tile_keys, tiles);
  const ArenaScope scope(*ctx.scratch);
  const QueryGradients x = QueryGradientsOf(ctx, op, q, out, lse, dout, first_query);
  const auto count = static_cast<int64_t>(tiles.size());
  const TokenTile* device_tiles = UploadScratch(ctx, tiles.data(), count);
  LaunchDelta(op, problem, q.dim(2), x, device_tiles, count, kTileTokens);
  ForTileShape(q.dim(2), tile_keys, [&](auto size, auto keys) {
    constexpr int D = decltype(size)::value;
    constexpr int kKeys = decltype(keys)::value;
    constexpr int64_t kStage = KeyRing<D, kKeys>::kStage;
    const int stages = RingStages(op, SharedBytes<Bf16>(kStage), walk.bytes());
    op.Launch(SparseQueryGradientKernel<D, kKeys>, dim3(Blocks(count * problem.kv_heads)),
              dim3(kThreads), SharedBytes<Bf16>(stages * kStage) + walk.bytes(), problem, x.dout,
              shape, ChosenBlocksOf(op, blocks, first_query), x.lse, x.lse_stride, x.delta,
              OutputOf(op, dq, first_query), device_tiles, walk, stages);
  });
  const KeyWork work =
      BuildKeyWork(ctx, op, documents, config, shape, problem.kv_heads, blocks, first_query);
  LaunchKeyGradient(ctx, op, problem, q.dim(2), x, work, dk, dv);
}

}  // namespace sala::kernels
