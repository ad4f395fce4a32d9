// What scores are made of in the block selection of cuda_select.cu: tiles of tokens and of keys,
// products on tensor cores, the log-sum-exp of a row, the sum over the rows of a token. Not part of
// the room's interface.
#pragma once

#include "kernels/common/cuda_math.h"
#include "kernels/common/ptx.h"

namespace sala::kernels::selection {

constexpr int kTokens = 16;  // of a thread block
constexpr int kThreads = kTokens / 2 * kWarp;
constexpr int kRows = 16;   // query heads of a token, padded
constexpr int kKeys = 64;   // of a tile
constexpr int kChunk = 16;  // keys a warp scores at a time
constexpr int kStages = 3;
// Relevance of a token's keys of one tile behind that of the key before; 16 banks apart.
constexpr int kStrip = kKeys + 16;
constexpr float kLowest = -3.0e38F;
constexpr float kLog2E = 1.4426950408889634F;
constexpr float kLimit = 80.0F * kLog2E;  // of log2 of a head's relevance

// Documents in falling order of their tiles of tokens, each up to its last query.
struct Document {
  int64_t begin;  // first token
  int64_t length;
  int64_t first_fine;  // rows of the compressed keys
  int64_t first_coarse;
  int64_t before;       // tiles that start before any tile of this document does
  int64_t first_query;  // its first query, counted from its first token
};

// Positions, keys and blocks within a document are int: a document has fewer than 2^31 tokens.
struct SelectProblem {
  const Bf16* q;
  int64_t q_stride;
  const Bf16* fine;
  const Bf16* coarse;
  int64_t key_stride;
  const Document* documents;
  int64_t document_count;
  int32_t* blocks;
  int64_t blocks_stride;
  int heads;  // key/value heads
  int group;
  float scale;  // with log2 e
  int kernel_stride;
  int block_size;
  int per_block;  // fine keys that begin in a block
  int init_blocks;
  int window_blocks;
  int free;
  int width;  // of a list: max(1, free)
  int slice;  // blocks; slice * per_block is a multiple of kKeys
};

struct Tile {
  const Document* document;
  int first;  // token, document-relative
  int count;
};

// Tiles begin with a document's first query. They are numbered by falling index inside their
// documents: first those of the highest index, the document's with the most before the next one's.
// With m documents that have a tile of index i, these m are in a row; SortDocuments says where rows
// begin.
__device__ __forceinline__ Tile FindTile(const SelectProblem& p, int64_t number) {
  int64_t low = 0;
  int64_t high = p.document_count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.documents[middle].before <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t among = low + 1;
  const int64_t past = number - p.documents[low].before;
  const int64_t queries = p.documents[low].length - p.documents[low].first_query;
  const int64_t tiles = (queries + kTokens - 1) / kTokens;
  Tile tile;
  tile.document = p.documents + past % among;
  tile.first = static_cast<int>(tile.document->first_query + (tiles - 1 - past / among) * kTokens);
  tile.count = static_cast<int>(min(int64_t{kTokens}, tile.document->length - tile.first));
  return tile;
}

// Candidate blocks of the token at position t: [first, last).
__device__ __forceinline__ int LastCandidate(const SelectProblem& p, int t) {
  return max(0, t / p.block_size - p.window_blocks);
}
__device__ __forceinline__ int FirstCandidate(const SelectProblem& p, int last) {
  return min(p.init_blocks, last);
}

// Windows `stride` apart and 2 * stride long that end at or before the token at position t.
__device__ __forceinline__ int VisibleWindows(int t, int stride) {
  return max(0, (t + 1) / stride - 1);
}

// Eight elements of a row of a key tile. The pieces of a row are permuted so that the eight rows of
// a matrix lie in different banks, whatever part of 128 bytes a row is.
template <int kD>
__device__ __forceinline__ int PieceOffset(int row, int piece) {
  constexpr int kPieces = kD / 8;
  constexpr int kPerLine = kPieces < 8 ? 8 / kPieces : 1;  // rows in 128 bytes
  constexpr int kMask = kPieces < 8 ? kPieces - 1 : 7;
  return row * kD + ((piece ^ (row / kPerLine & kMask)) * 8);
}

// Calls body(first key, tile) for tiles of the keys [0, end); those from `rows` on are zero.
template <int kD, typename Body>
__device__ __forceinline__ void ForEachKeyTile(const Bf16* keys, int64_t stride, int end, int rows,
                                               Bf16* ring, const Body& body) {
  const int tiles = (end + kKeys - 1) / kKeys;
  // A thread copies the same piece of every kRowsAtOnce-th row.
  constexpr int kRowsAtOnce = kThreads / (kD / 8);
  static_assert(kRowsAtOnce % 8 == 0, "rows of a thread are permuted alike");
  const int thread_row = static_cast<int>(threadIdx.x) / (kD / 8);
  const int thread_piece = static_cast<int>(threadIdx.x) % (kD / 8);
  const int shared_offset = PieceOffset<kD>(thread_row, thread_piece);
  const Bf16* thread_keys = keys + thread_row * stride + thread_piece * 8;
  const auto load = [&](int tile) {
    if (tile < tiles) {
      Bf16* to = ring + tile % kStages * (kKeys * kD) + shared_offset;
      const Bf16* from = thread_keys + int64_t{tile} * kKeys * stride;
      const int left = rows - tile * kKeys;
#pragma unroll 1
      for (int row = thread_row; row < kKeys; row += kRowsAtOnce) {
        ptx::CpAsync16(to, row < left ? from : keys, row < left ? 16 : 0);
        to += kRowsAtOnce * kD;
        from += kRowsAtOnce * stride;
      }
    }
    ptx::CpAsyncCommit();
  };
  __syncthreads();  // the ring may still be read from the call before
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::CpAsyncWait<kStages - 2>();
    __syncthreads();  // the tile is there, and the one before it is done with
    load(tile + kStages - 1);
    body(tile * kKeys, ring + tile % kStages * (kKeys * kD));
  }
  ptx::CpAsyncWait<0>();
}

// Fragments of the queries of two tokens.
template <int kD>
struct Queries {
  uint32_t of[2][kD / 16][4];
};

template <int kD>
__device__ __forceinline__ Queries<kD> LoadQueries(const SelectProblem& p, const Tile& tile,
                                                   int head, int token) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  Queries<kD> queries;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      const bool used = token + i < tile.count && row < p.group;
      const int64_t t = tile.document->begin + tile.first + (used ? token + i : 0);
      const int from_row = head * p.group + (used ? row : 0);
      const auto* from =
          reinterpret_cast<const uint32_t*>(p.q + t * p.q_stride + from_row * kD) + lane % 4;
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        const uint32_t low = from[k * 8];
        const uint32_t high = from[k * 8 + 4];
        queries.of[i][k][half] = used ? low : 0U;
        queries.of[i][k][half + 2] = used ? high : 0U;
      }
    }
  }
  return queries;
}

// Products of two tokens' queries with 16 keys of a tile: s[token][keys / 8], the C fragments.
template <int kD>
__device__ __forceinline__ void Products(const Queries<kD>& queries, Bf16* tile, int first,
                                         float (&s)[2][2][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int part = 0; part < 4; ++part) s[i][j][part] = 0.0F;
    }
  }
  // A step of k flips bits of the piece: an exclusive or of the address, one register for all.
  const int at = PieceOffset<kD>(first + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t b[4];
    ptx::LdMatrix4(b, tile + (at ^ (k * 16)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::MmaBf16(s[i][0], queries.of[i][k], b[0], b[1]);
      ptx::MmaBf16(s[i][1], queries.of[i][k], b[2], b[3]);
    }
  }
}

// Log-sum-exp over the visible coarse keys, base 2: normaliser[token][rows / 8]. Infinite for rows
// without a query or without a visible key, whose relevance is then 0.
template <int kD>
__device__ __forceinline__ void Normalisers(const SelectProblem& p, const Tile& tile, int head,
                                            int token, const Queries<kD>& queries, Bf16* ring,
                                            float (&normaliser)[2][2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int stride = 4 * p.kernel_stride;
  const int end = VisibleWindows(tile.first + tile.count - 1, stride);
  int visible[2];
  float largest[2][2];
  float sum[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    visible[i] = token + i < tile.count ? VisibleWindows(tile.first + token + i, stride) : 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[i][r] = kLowest;
      sum[i][r] = 0.0F;
    }
  }
  const Bf16* keys = p.coarse + tile.document->first_coarse * p.key_stride + int64_t{head} * kD;
  ForEachKeyTile<kD>(keys, p.key_stride, end, end, ring, [&](int first, Bf16* shared_keys) {
    // Only the last tile or two has keys that a token does not see.
    const bool masked = first + kKeys > min(visible[0], visible[1]);
#pragma unroll 1
    for (int chunk = 0; chunk < kKeys; chunk += kChunk) {
      float s[2][2][4];
      Products<kD>(queries, shared_keys, chunk, s);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int part = 0; part < 4; ++part) s[i][j][part] *= p.scale;
        }
      }
      if (masked) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
              const int key = first + chunk + j * 8 + lane % 4 * 2 + part % 2;
              if (key >= visible[i]) s[i][j][part] = -INFINITY;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float a = s[i][0][2 * r];
          const float b = s[i][0][2 * r + 1];
          const float c = s[i][1][2 * r];
          const float d = s[i][1][2 * r + 1];
          const float m = fmaxf(largest[i][r], fmaxf(fmaxf(a, b), fmaxf(c, d)));
          sum[i][r] =
              sum[i][r] * ptx::Exp2(largest[i][r] - m) +
              ((ptx::Exp2(a - m) + ptx::Exp2(b - m)) + (ptx::Exp2(c - m) + ptx::Exp2(d - m)));
          largest[i][r] = m;
        }
      }
    }
  });
  // Four lanes share a row. All take the value of the first: it must be the same to the bit, or
  // equal keys would no longer tie.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        const float other = __shfl_xor_sync(kFullMask, largest[i][r], offset);
        const float other_sum = __shfl_xor_sync(kFullMask, sum[i][r], offset);
        const float m = fmaxf(largest[i][r], other);
        sum[i][r] = sum[i][r] * ptx::Exp2(largest[i][r] - m) + other_sum * ptx::Exp2(other - m);
        largest[i][r] = m;
      }
      const bool row = lane / 4 + r * 8 < p.group && sum[i][r] > 0.0F;
      const float value = row ? largest[i][r] + ptx::Log2(sum[i][r]) : INFINITY;
      normaliser[i][r] = __shfl_sync(kFullMask, value, lane / 4 * 4);
    }
  }
}

// The relevance of 16 keys for two tokens, one key and token a lane: the lane's token is lane / 16,
// its key 8 * (bit 3) + 2 * (bits 1, 0) + (bit 2). The rows of a token are added in a tree: a row
// and the one 8 below it, then rows 4, 2, 1 apart. Each step halves the values a lane holds.
__device__ __forceinline__ float SumOfRows(const SelectProblem& p, const float (&s)[2][2][4],
                                           const float (&normaliser)[2][2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float x[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float a = __fmaf_rn(s[i][v / 2][v % 2], p.scale, -normaliser[i][0]);
      const float b = __fmaf_rn(s[i][v / 2][v % 2 + 2], p.scale, -normaliser[i][1]);
      x[i][v] = ptx::Exp2(fminf(a, kLimit)) + ptx::Exp2(fminf(b, kLimit));
    }
  }
  const bool token = (lane & 16) != 0;
  float y[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    const float give = token ? x[0][v] : x[1][v];
    y[v] = (token ? x[1][v] : x[0][v]) + __shfl_xor_sync(kFullMask, give, 16);
  }
  const bool half = (lane & 8) != 0;
  float z[2];
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const float give = half ? y[v] : y[2 + v];
    z[v] = (half ? y[2 + v] : y[v]) + __shfl_xor_sync(kFullMask, give, 8);
  }
  const bool odd = (lane & 4) != 0;
  const float give = odd ? z[0] : z[1];
  return (odd ? z[1] : z[0]) + __shfl_xor_sync(kFullMask, give, 4);
}

}  // namespace sala::kernels::selection
