// What the backward passes of dense and sparse attention share on the GPU. Both give dq by the
// tiling of the forward pass and dk, dv by blocks of keys, which nobody else writes: no atomics,
// every sum in a fixed order.
//
// A block of keys is attended by a sequence of tokens: the run that starts with the block's own
// tokens, then a list (sparse: the later tokens that chose the block). Where queries are a range of
// the tokens, the sequence leaves out those before and behind it. A KeyTile is a piece [first,
// last) of it; a block of one piece is written straight to dk and dv (zeros for an empty one), the
// pieces of longer ones leave float32 sums in slots, which a KeySum adds in order.
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

// Calls tile(TokenTile) for the queries of a document in tiles of `most` tokens that begin at
// multiples of `unit`; queries that begin between two of these come first, up to the next one. What
// a row sees in its warp or block then never depends on where the queries begin.
template <typename Tile>
void ForEachTokenTile(const DocumentRange& document, const DocumentRange& queries, int64_t unit,
                      int64_t most, const Tile& tile) {
  for (int64_t first = queries.begin; first < queries.end;) {
    const bool between = first % unit != 0;
    const int64_t next = between ? CeilDiv(first, unit) * unit : first + most;
    const int64_t n = between ? std::min(next, queries.end) : queries.end;
    tile(TokenTile{document.begin, static_cast<int32_t>(n), static_cast<int32_t>(first)});
    first = next;
  }
}

// The queries [first_query, first_query + count) in tiles of kDenseQueries tokens, those with the
// most keys first.
std::vector<TokenTile> DenseTiles(std::span<const DocumentRange> documents, int64_t first_query,
                                  int64_t count);

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
  int32_t run = 0;       // the run ends before token key + run, then comes the list
  int32_t first = 0;     // the piece of the sequence, counted from token `key`
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

// What the steps of a backward pass read of the queries, counted from token 0 as FromToken does.
struct QueryGradients {
  Input out, dout;
  const float* lse = nullptr;
  int64_t lse_stride = 0;
  float* delta = nullptr;  // [T, N]
};
// Checks the shapes; takes Tq * N floats of scratch for delta.
QueryGradients QueryGradientsOf(const Context& ctx, const Op& op, const ConstTensor& q,
                                const ConstTensor& out, const ConstTensor& lse,
                                const ConstTensor& dout, int64_t first_query);

// delta[t, h] = sum over c of do[t, h, c] o[t, h, c], for `tokens` tokens of each tile.
void LaunchDelta(const Op& op, const Problem& problem, int64_t d, const QueryGradients& x,
                 const TokenTile* tiles, int64_t count, int tokens);

// dk and dv, bf16 or f32. Takes block_size * D * 8 bytes of scratch for each slot.
void LaunchKeyGradient(const Context& ctx, const Op& op, const Problem& problem, int64_t d,
                       const QueryGradients& x, const KeyWork& work, const Tensor& dk,
                       const Tensor& dv);

}  // namespace sala::kernels::tile
