// What the backward passes of dense and sparse attention share on the GPU. Both give dq by the
// tiling of the forward pass and dk, dv by blocks of keys, which nobody else writes: no atomics,
// every sum in a fixed order.
//
// A block of keys is attended by a sequence of tokens: the run that starts with the block's own
// tokens, then a list (sparse: the later tokens that chose the block). A KeyTile is a piece
// [first, last) of that sequence; a block of one piece is written straight to dk and dv, the pieces
// of longer ones leave float32 sums in slots, which a KeySum adds in order.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention/cuda_tile.h"

namespace sala::kernels::tile {

constexpr int kDenseKeys = 64;                 // of a tile
constexpr int kDenseQueries = kWarps * kRows;  // of a tile

__host__ __device__ inline int DenseKeyTiles(const TokenTile& tile) {
  const int end = tile.first + kDenseQueries < tile.n ? tile.first + kDenseQueries : tile.n;
  return (end + kDenseKeys - 1) / kDenseKeys;
}

// Tiles of kDenseQueries tokens, those with the most keys first.
std::vector<TokenTile> DenseTiles(std::span<const DocumentRange> documents);

// A number of blocks for a grid.
inline unsigned Blocks(int64_t count) {
  SALA_CHECK(count < int64_t{1} << 31) << count << " blocks, expected fewer than 2^31";
  return static_cast<unsigned>(count);
}

struct KeyTile {
  int64_t document = 0;  // its first token
  int64_t list = 0;      // the block's list in the array of lists
  int32_t n = 0;         // tokens of the document
  int32_t key = 0;       // first key of the block
  int32_t head = 0;      // key/value head
  int32_t run = 0;       // tokens key .. key + run - 1, before the list
  int32_t first = 0;     // the piece of the sequence
  int32_t last = 0;
  int32_t slot = -1;  // where its sums go; -1: to dk and dv
  int32_t unused = 0;
};

struct KeySum {
  int64_t document = 0;
  int32_t n = 0;
  int32_t key = 0;
  int32_t head = 0;
  int32_t slot = 0;  // first of `count`
  int32_t count = 0;
  int32_t unused = 0;
};

// The work of the gradient of keys and values, all on the device. `counts` [2] holds how many tiles
// and sums there are; null: as many as the bounds say.
struct KeyWork {
  const KeyTile* tiles = nullptr;
  const KeySum* sums = nullptr;
  const int32_t* counts = nullptr;
  int64_t most_tiles = 0;
  int64_t most_sums = 0;
  int64_t slots = 0;
  const int32_t* lists = nullptr;  // tokens, relative to their documents
  int block_size = kDenseKeys;
};

// delta[t, h] = sum over c of do[t, h, c] o[t, h, c], float32 [T, N], for `tokens` tokens of each
// tile.
void LaunchDelta(const Op& op, const Problem& problem, int64_t d, const ConstTensor& out,
                 const ConstTensor& dout, const TokenTile* tiles, int64_t count, int tokens,
                 float* delta);

// dk and dv. Takes block_size * D * 8 bytes of scratch for each slot.
void LaunchKeyGradient(const Context& ctx, const Op& op, const Problem& problem, int64_t d,
                       const ConstTensor& dout, const ConstTensor& lse, const float* delta,
                       const KeyWork& work, const Tensor& dk, const Tensor& dv);

}  // namespace sala::kernels::tile
