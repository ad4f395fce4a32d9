// What forward and dq of sparse attention share on the GPU: a tile is eight consecutive tokens of a
// document inside one block, a warp each, whose rows are the heads of one group. The tile walks
// over the union of its tokens' blocks; each entry of the walk says which of the eight take it.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "kernels/attention/cuda_backward.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels::tile {

constexpr int kTileTokens = kWarps;

struct SparseShape {
  int block = 64;  // tokens
  int init = 1;    // blocks
  int local = 33;  // blocks, own included
  int width = 1;   // of a list of chosen blocks
};

// Blocks [first, last) are neither initial nor local for a query in block `own` (CandidateBlocks).
struct Candidates {
  int first;
  int last;
};
__host__ __device__ inline Candidates CandidatesOf(const SparseShape& z, int own) {
  const int last = own - z.local + 1 > 0 ? own - z.local + 1 : 0;
  return {z.init < last ? z.init : last, last};
}

// blocks [T, K, width], counted from token 0.
struct ChosenBlocks {
  const int32_t* data = nullptr;
  int64_t stride = 0;  // elements from token to token
};

// The shared memory of a walk.
struct WalkSize {
  int64_t mask_words = 1;  // a byte for each candidate block
  int64_t entries = 1;
  size_t bytes() const {
    return SharedBytes<uint32_t>(mask_words) + SharedBytes<int32_t>(entries) +
           SharedBytes<int32_t>(kWarps);
  }
};

// For the longest of `tiles`.
inline WalkSize WalkSizeOf(const SparseShape& z, int tile_keys, std::span<const TokenTile> tiles) {
  int64_t n = 1;
  for (const TokenTile& tile : tiles) n = std::max<int64_t>(n, tile.n);
  const int64_t blocks = CeilDiv(n, z.block);
  const int64_t seen = int64_t{z.init} + z.local + int64_t{kTileTokens} * z.width;
  return {CeilDiv(blocks, 4), std::min(blocks, seen) * (z.block / tile_keys)};
}

// Writes the walk of one tile to entries: tile of keys (of kKeys keys, from the start of the
// document) << 8 | a bit for each token. Own block first, so that every row begins with a key it
// sees; then the other forced blocks, then the union of the chosen ones, ascending. Numbers that
// are no candidates (kNoBlock) are passed over. All threads call this together; `chosen` is the
// list of the tile's first token, `counts` takes kWarps numbers. Returns the number of entries.
template <int kKeys>
__device__ __forceinline__ int BuildWalk(const SparseShape& z, const int32_t* chosen,
                                         int64_t chosen_stride, const TokenTile& tile,
                                         uint32_t* masks, int32_t* entries, int32_t* counts) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = Lane();
  const int warp = WarpIndex();
  const int tokens = min(kTileTokens, tile.n - tile.first);
  const int parts = z.block / kKeys;
  const int own = tile.first / z.block;
  const Candidates candidates = CandidatesOf(z, own);
  const int free = candidates.last - candidates.first;
  for (int i = thread; i < (free + 3) / 4; i += kThreads) masks[i] = 0;
  __syncthreads();
  if (warp < tokens) {
    for (int i = lane; i < z.width; i += kWarp) {
      const int b = chosen[warp * chosen_stride + i] - candidates.first;
      if (b >= 0 && b < free) atomicOr(&masks[b / 4], 1U << (b % 4 * 8 + warp));
    }
  }
  const int own_tiles = (tile.first + tokens - 1 - own * z.block) / kKeys + 1;
  const int forced = own_tiles + (candidates.first + own - candidates.last) * parts;
  for (int i = thread; i < forced; i += kThreads) {
    int key_tile = own * parts + i;
    if (i >= own_tiles) {
      key_tile = i - own_tiles;
      if (key_tile >= candidates.first * parts) key_tile += free * parts;
    }
    entries[i] = key_tile << 8 | 0xff;
  }
  __syncthreads();
  // Each warp packs its share of the candidates behind those of the warps before it.
  const int share = (free + kThreads - 1) / kThreads * kWarp;
  const int begin = warp * share;
  const int end = min(begin + share, free);
  int count = 0;
  for (int i = begin; i < end; i += kWarp) {
    const int b = i + lane;
    const bool taken = b < end && (masks[b / 4] >> (b % 4 * 8) & 255U) != 0;
    count += __popc(__ballot_sync(kFullMask, taken));
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int place = forced;
  int total = forced;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += counts[w] * parts;
    total += counts[w] * parts;
  }
  for (int i = begin; i < end; i += kWarp) {
    const int b = i + lane;
    const uint32_t mask = b < end ? masks[b / 4] >> (b % 4 * 8) & 255U : 0;
    const unsigned taken = __ballot_sync(kFullMask, mask != 0);
    if (mask != 0) {
      const int to = place + __popc(taken & ((1U << lane) - 1)) * parts;
      for (int part = 0; part < parts; ++part) {
        entries[to + part] =
            ((candidates.first + b) * parts + part) << 8 | static_cast<int32_t>(mask);
      }
    }
    place += __popc(taken) * parts;
  }
  __syncthreads();
  return total;
}

// ---- Host ----

inline int KeysOfTile(const SparseAttentionConfig& config) {
  return config.block_size % 64 == 0 ? 64 : 16;
}

inline SparseShape SparseShapeOf(const SparseAttentionConfig& config, const Problem& problem,
                                 const ConstTensor& blocks, int64_t tokens) {
  const std::string wrong = SparseConfigProblem(config);
  SALA_CHECK(wrong.empty()) << wrong;
  SALA_CHECK(config.block_size % 16 == 0)
      << "block_size " << config.block_size << ", expected a multiple of 16 on a GPU";
  SALA_CHECK(problem.group <= kRows)
      << problem.group << " query heads to a key/value head, expected at most 16 on a GPU";
  const int64_t width = std::max<int64_t>(1, config.free_blocks());
  SALA_CHECK(blocks.rank() == 3 && blocks.dim(0) == tokens && blocks.dim(1) == problem.kv_heads &&
             blocks.dim(2) == width && blocks.stride(1) == width)
      << "found blocks " << ShapeText(blocks) << ", expected [" << tokens << ", "
      << problem.kv_heads << ", " << width << "]";
  return {static_cast<int>(config.block_size), static_cast<int>(config.init_blocks),
          static_cast<int>(config.local_blocks()), static_cast<int>(width)};
}

inline ChosenBlocks ChosenBlocksOf(const Op& op, const ConstTensor& blocks, int64_t first_query) {
  return {DataFromToken<int32_t>(op, blocks, first_query), blocks.stride(0)};
}

// The queries [first_query, first_query + count) in tiles of kTileTokens tokens: those that see the
// most blocks first, in order otherwise, so that neighbours, which share blocks, run at the same
// time.
inline std::vector<TokenTile> SparseTiles(std::span<const DocumentRange> documents,
                                          const SparseAttentionConfig& config, int64_t first_query,
                                          int64_t count) {
  std::vector<TokenTile> tiles;
  for (const DocumentRange& document : documents) {
    ForEachTokenTile(document, PartOf(document, first_query, count), kTileTokens, kTileTokens,
                     [&tiles](const TokenTile& tile) { tiles.push_back(tile); });
  }
  const auto seen = [&config](const TokenTile& tile) {
    return std::min(tile.first / config.block_size + 1, config.total_blocks());
  };
  std::stable_sort(tiles.begin(), tiles.end(),
                   [&seen](const TokenTile& a, const TokenTile& b) { return seen(a) > seen(b); });
  return tiles;
}

// Calls body(D, keys of a tile), both as std::integral_constant.
template <typename Body>
void ForTileShape(int64_t d, int tile_keys, const Body& body) {
  ForHeadSize(d, [&](auto size) {
    if (tile_keys == 64) {
      body(size, std::integral_constant<int, 64>());
    } else {
      body(size, std::integral_constant<int, 16>());
    }
  });
}

}  // namespace sala::kernels::tile
