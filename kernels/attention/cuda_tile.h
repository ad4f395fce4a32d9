// Device code that the dense and the sparse attention kernels share: tiles of keys in shared
// memory, matrix products of a warp, the online softmax and the two gradients.
//
// A warp owns 16 rows (queries, or keys in the gradient of the keys); its operands and sums stay in
// registers. S, dP and all sums are float32; P and dS are rounded to bf16 as operands of the next
// product only, and the sum of a row takes the unrounded P. exp(scale s - m) is
// exp2(scale log2(e) s - m'), one FMA and one instruction.
//
// Rows that do not exist (past the document, heads that pad a group) are zeros: S = dP = 0, and
// what they add to a gradient is multiplied by their zero q or dO. Keys past the document are zeros
// too, and hidden by the causal mask, because they come after every query.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "kernels/attention/block_attention.h"
#include "kernels/common/cuda_math.h"
#include "kernels/common/ptx.h"

namespace sala::kernels::tile {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16;  // of a warp
constexpr float kLog2E = 1.44269504F;

// Query tokens first, first + 1, .. of the document that starts at token `document`. They end at n,
// and no key from n on is seen by any of them: n is where the document ends, or its queries do, or
// a tile that begins where the queries do and must not go on to its full size.
struct TokenTile {
  int64_t document = 0;
  int32_t n = 0;
  int32_t first = 0;
};

// [T, heads, D], heads contiguous.
struct Input {
  const Bf16* data = nullptr;
  int64_t stride = 0;  // elements from token to token
};
struct Output {
  Bf16* data = nullptr;
  int64_t stride = 0;
};

struct Problem {
  Input q, k, v;
  int heads = 1;  // of q
  int kv_heads = 1;
  int group = 1;  // heads / kv_heads
  float scale = 1.0F;
  float scale_log2 = kLog2E;  // scale * log2(e)
};

// ---- Host: checks, sizes, the switch over head sizes ----

inline void CheckDeviceHeads(const ConstTensor& x, int64_t tokens, int64_t heads, int64_t d) {
  SALA_CHECK(x.rank() == 3 && x.dim(0) == tokens && x.dim(1) == heads && x.dim(2) == d)
      << "found " << ShapeText(x) << ", expected [" << tokens << ", " << heads << ", " << d << "]";
  SALA_CHECK((heads == 1 || x.stride(1) == d) && x.stride(0) % 8 == 0 &&
             reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0)
      << ShapeText(x) << " with token stride " << x.stride(0) << " and head stride " << x.stride(1)
      << ": expected contiguous heads and rows at multiples of 8 elements on a GPU";
}

// `first_query`: the token of row 0.
inline Input InputOf(const Op& op, const ConstTensor& x, int64_t first_query) {
  return {DataFromToken<Bf16>(op, x, first_query), x.stride(0)};
}
inline Output OutputOf(const Op& op, const Tensor& x, int64_t first_query) {
  return {DataFromToken<Bf16>(op, x, first_query), x.stride(0)};
}

inline Problem ProblemOf(const Op& op, const ConstTensor& q, const ConstTensor& k,
                         const ConstTensor& v, float scale, int64_t first_query) {
  const int64_t heads = q.dim(1);
  const int64_t kv_heads = k.dim(1);
  SALA_CHECK(kv_heads >= 1 && heads % kv_heads == 0)
      << heads << " query heads, " << kv_heads << " key/value heads";
  SALA_CHECK(scale > 0) << "scale " << scale << ", expected a positive number";
  const int64_t d = q.dim(2);
  SALA_CHECK(d == 16 || d == 32 || d == 64 || d == 128)
      << "head size " << d << ", expected 16, 32, 64 or 128 on a GPU";
  CheckDeviceHeads(q, q.dim(0), heads, d);
  CheckDeviceHeads(k, k.dim(0), kv_heads, d);
  CheckDeviceHeads(v, k.dim(0), kv_heads, d);
  CheckQueries(first_query, q.dim(0), k.dim(0));
  return {InputOf(op, q, first_query),
          InputOf(op, k, 0),
          InputOf(op, v, 0),
          static_cast<int>(heads),
          static_cast<int>(kv_heads),
          static_cast<int>(heads / kv_heads),
          scale,
          scale * kLog2E};
}

inline void CheckStatistics(const ConstTensor& x, int64_t tokens, int64_t heads) {
  SALA_CHECK(x.rank() == 2 && x.dim(0) == tokens && x.dim(1) == heads)
      << "found " << ShapeText(x) << ", expected [" << tokens << ", " << heads << "]";
}

// Calls body(std::integral_constant<int, D>()).
template <typename Body>
void ForHeadSize(int64_t d, const Body& body) {
  if (d == 16) body(std::integral_constant<int, 16>());
  if (d == 32) body(std::integral_constant<int, 32>());
  if (d == 64) body(std::integral_constant<int, 64>());
  if (d == 128) body(std::integral_constant<int, 128>());
}

// Stages of a ring of `stage_bytes` each beside `other_bytes`: two at least, more hide more of the
// memory's latency, beyond four nothing is left to hide.
inline int RingStages(const Op& op, size_t stage_bytes, size_t other_bytes, size_t most = 4) {
  const size_t limit = op.device().info().shared_bytes_per_block;
  SALA_CHECK(other_bytes + 2 * stage_bytes <= limit)
      << "found " << limit << " bytes of shared memory per block, expected "
      << other_bytes + 2 * stage_bytes;
  return static_cast<int>(std::min(most, (limit - other_bytes) / stage_bytes));
}

// ---- Device ----

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int WarpIndex() { return static_cast<int>(threadIdx.x / kWarp); }

// Where eight elements of a tile of rows of D lie, `column` a multiple of 8. Chunks are exchanged
// (XOR) so that the eight rows of an ldmatrix lie in different banks: rows shorter than 128 bytes
// share a line of banks, and the exchange follows the line. Hence
//   Place(row + 16 j, column ^ 16 x) = Place(row, column) + 16 j D  XOR  16 x.
template <int D>
__device__ __forceinline__ int Place(int row, int column) {
  constexpr int kChunks = D / 8;
  constexpr int kRowsOfLine = kChunks < 8 ? 8 / kChunks : 1;
  constexpr int kMask = (kChunks < 8 ? kChunks : 8) - 1;
  return row * D + ((column / 8) ^ (row / kRowsOfLine & kMask)) * 8;
}

__device__ __forceinline__ uint32_t LoadPair(const Bf16* from) {
  const __nv_bfloat162 pair = *reinterpret_cast<const __nv_bfloat162*>(from);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

__device__ __forceinline__ void StorePair(Bf16* to, float low, float high) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(low, high);
}

// The A operands of 16 rows of D, straight from global memory: once a kernel, so the 4-byte loads
// cost little. rows[h]: row lane / 4 + 8 h; null for zeros.
template <int D>
__device__ __forceinline__ void LoadRows(uint32_t (&a)[D / 16][4], const Bf16* const (&rows)[2]) {
  const int column = Lane() % 4 * 2;
#pragma unroll
  for (int x = 0; x < D / 16; ++x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Bf16* row = rows[i % 2];
      a[x][i] = row == nullptr ? 0 : LoadPair(row + 16 * x + column + i / 2 * 8);
    }
  }
}

// c [16, kN] = A [16, D] times rows first .. first + kN - 1 of the tile, transposed; `first` a
// multiple of 16, here and below.
template <int D, int kN>
__device__ __forceinline__ void MultiplyTransposed(float (&c)[kN / 8][4],
                                                   const uint32_t (&a)[D / 16][4], Bf16* tile,
                                                   int first) {
  const int place = Place<D>(Lane() % 8 + Lane() / 16 * 8, Lane() / 8 % 2 * 8);
  tile += first * D;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[j][i] = 0.0F;
  }
#pragma unroll
  for (int x = 0; x < D / 16; ++x) {
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      uint32_t b[4];
      ptx::LdMatrix4(b, tile + 16 * j * D + (place ^ 16 * x));
      ptx::MmaBf16(c[2 * j], a[x], b[0], b[1]);
      ptx::MmaBf16(c[2 * j + 1], a[x], b[2], b[3]);
    }
  }
}

// c [16, D] += A [16, 16] times rows first .. first + 15 of the tile.
template <int D>
__device__ __forceinline__ void MultiplyAdd(float (&c)[D / 8][4], const uint32_t (&a)[4],
                                            Bf16* tile, int first) {
  const int place = Place<D>(Lane() % 16, Lane() / 16 * 8);
  tile += first * D;
#pragma unroll
  for (int x = 0; x < D / 16; ++x) {
    uint32_t b[4];
    ptx::LdMatrix4Trans(b, tile + (place ^ 16 * x));
    ptx::MmaBf16(c[2 * x], a, b[0], b[1]);
    ptx::MmaBf16(c[2 * x + 1], a, b[2], b[3]);
  }
}

// A result [16, 16], two tiles of eight columns, as the A operand of the next product.
__device__ __forceinline__ void RoundToOperand(uint32_t (&a)[4], const float (&left)[4],
                                               const float (&right)[4]) {
  a[0] = PackBf16(left[0], left[1]);
  a[1] = PackBf16(left[2], left[3]);
  a[2] = PackBf16(right[0], right[1]);
  a[3] = PackBf16(right[2], right[3]);
}

// Waits until the oldest of `stages` - 1 groups of copies has arrived.
__device__ __forceinline__ void WaitForOldest(int stages) {
  if (stages == 2) {
    ptx::CpAsyncWait<0>();
  } else if (stages == 3) {
    ptx::CpAsyncWait<1>();
  } else {
    ptx::CpAsyncWait<2>();
  }
}

// A ring of tiles of kKeys keys and values of one document and key/value head, filled in the
// background.
template <int D, int kKeys>
class KeyRing {
 public:
  static constexpr int64_t kStage = int64_t{2} * kKeys * D;  // elements

  __device__ __forceinline__ KeyRing(Bf16* memory, int stages, const Problem& p,
                                     const TokenTile& tile, int64_t kv_head)
      : memory_(memory),
        stages_(stages),
        k_(p.k.data + tile.document * p.k.stride + kv_head * D),
        v_(p.v.data + tile.document * p.v.stride + kv_head * D),
        k_stride_(p.k.stride),
        v_stride_(p.v.stride),
        n_(tile.n) {}

  // Calls use(i, keys, values) for i in [0, tiles): rows are the keys from key_of(i) on. All
  // threads call this together.
  template <typename KeyOf, typename Use>
  __device__ __forceinline__ void ForEach(int tiles, const KeyOf& key_of, const Use& use) {
    for (int i = 0; i < stages_ - 1; ++i) {
      if (i < tiles) Copy(i, key_of(i));
      ptx::CpAsyncCommit();
    }
    int stage = 0;
    for (int i = 0; i < tiles; ++i) {
      WaitForOldest(stages_);
      __syncthreads();  // tile i is there; tile i - 1 is no longer read
      const int next = i + stages_ - 1;
      if (next < tiles) Copy(stage == 0 ? stages_ - 1 : stage - 1, key_of(next));
      ptx::CpAsyncCommit();
      Bf16* keys = memory_ + stage * kStage;
      use(i, keys, keys + int64_t{kKeys} * D);
      stage = stage + 1 == stages_ ? 0 : stage + 1;
    }
    ptx::CpAsyncWait<0>();
  }

 private:
  __device__ __forceinline__ void Copy(int stage, int key) {
    Bf16* keys = memory_ + stage * kStage;
    constexpr int kChunks = D / 8;
    constexpr int kCount = kKeys * kChunks;
#pragma unroll
    for (int start = 0; start < kCount; start += kThreads) {
      const unsigned i = start + threadIdx.x;
      if (kCount % kThreads != 0 && i >= kCount) break;
      const int row = static_cast<int>(i / kChunks);
      const int column = static_cast<int>(i % kChunks * 8);
      const bool inside = key + row < n_;
      const int64_t from = inside ? key + row : 0;
      Bf16* to = keys + Place<D>(row, column);
      ptx::CpAsync16(to, k_ + from * k_stride_ + column, inside ? 16 : 0);
      ptx::CpAsync16(to + kKeys * D, v_ + from * v_stride_ + column, inside ? 16 : 0);
    }
  }

  Bf16* memory_;
  int stages_;
  const Bf16* k_;
  const Bf16* v_;
  int64_t k_stride_, v_stride_;
  int n_;
};

// The two rows of a lane among the 16 of its warp.
struct QueryRows {
  int64_t token[2];  // in the buffer
  int head[2];       // query head
  int position[2];   // in the document
  bool valid[2];
  int lowest;  // least position in the warp
};

template <int D>
__device__ __forceinline__ void LoadRows(uint32_t (&a)[D / 16][4], const Input& x,
                                         const QueryRows& rows) {
  const Bf16* from[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    from[h] =
        rows.valid[h] ? x.data + rows.token[h] * x.stride + int64_t{rows.head[h]} * D : nullptr;
  }
  LoadRows<D>(a, from);
}

template <int D>
__device__ __forceinline__ void StoreRows(const Output& x, const QueryRows& rows,
                                          const float (&c)[D / 8][4], const float (&factor)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!rows.valid[h]) continue;
    Bf16* to = x.data + rows.token[h] * x.stride + int64_t{rows.head[h]} * D + Lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      StorePair(to + 8 * j, c[j][2 * h] * factor[h], c[j][2 * h + 1] * factor[h]);
    }
  }
}

// The forward pass of a warp's rows over `tiles` tiles of keys; takes(i, key): whether the warp
// attends to tile i, the same on all lanes. The first tile a row takes must have a key it sees.
template <int D, int kKeys, typename KeyOf, typename Takes>
__device__ __forceinline__ void AttendRows(const Problem& p, const QueryRows& rows,
                                           KeyRing<D, kKeys>& ring, int tiles, const KeyOf& key_of,
                                           const Takes& takes, const Output& out, float* lse,
                                           int64_t lse_stride) {
  uint32_t q[D / 16][4];
  LoadRows<D>(q, p.q, rows);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float o[D / 8][4];
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) o[j][i] = 0.0F;
  }
  float top[2] = {-kInfinity, -kInfinity};
  float sum[2] = {0.0F, 0.0F};  // of the lane's own columns

  ring.ForEach(tiles, key_of, [&](int index, Bf16* keys, Bf16* values) {
    const int key = key_of(index);
    if (!takes(index, key)) return;
    float s[kKeys / 8][4];
    MultiplyTransposed<D, kKeys>(s, q, keys, 0);
    if (key + kKeys - 1 > rows.lowest) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = key + 8 * j + Lane() % 4 * 2 + i % 2;
          if (column > rows.position[i / 2]) s[j][i] = -kInfinity;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float now = top[h];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) now = fmaxf(now, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      now = fmaxf(now, __shfl_xor_sync(kFullMask, now, 1));
      now = fmaxf(now, __shfl_xor_sync(kFullMask, now, 2));
      const float base = now == -kInfinity ? 0.0F : now * p.scale_log2;
      const float rescale = ptx::Exp2(top[h] * p.scale_log2 - base);
      float added = 0.0F;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 2 * h; i < 2 * h + 2; ++i) {
          s[j][i] = ptx::Exp2(fmaf(s[j][i], p.scale_log2, -base));
          added += s[j][i];
        }
      }
      top[h] = now;
      sum[h] = sum[h] * rescale + added;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o[j][2 * h] *= rescale;
        o[j][2 * h + 1] *= rescale;
      }
    }
#pragma unroll
    for (int x = 0; x < kKeys / 16; ++x) {
      uint32_t a[4];
      RoundToOperand(a, s[2 * x], s[2 * x + 1]);
      MultiplyAdd<D>(o, a, values, 16 * x);
    }
  });

  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(kFullMask, sum[h], 1);
    sum[h] += __shfl_xor_sync(kFullMask, sum[h], 2);
    inverse[h] = 1.0F / sum[h];
    if (rows.valid[h] && Lane() % 4 == 0) {
      lse[rows.token[h] * lse_stride + rows.head[h]] = top[h] * p.scale + logf(sum[h]);
    }
  }
  StoreRows<D>(out, rows, o, inverse);
}

// dq of a warp's rows: P = exp(scale q.k - lse), dS = P (dO.v - delta), dq = scale sum dS k.
template <int D, int kKeys, typename KeyOf, typename Takes>
__device__ __forceinline__ void QueryGradientRows(const Problem& p, const Input& dout,
                                                  const QueryRows& rows, KeyRing<D, kKeys>& ring,
                                                  int tiles, const KeyOf& key_of,
                                                  const Takes& takes, const float* lse,
                                                  int64_t lse_stride, const float* delta,
                                                  const Output& dq) {
  constexpr int kSlice = kKeys < 32 ? kKeys : 32;  // keys at a time: S and dP stay small
  uint32_t q[D / 16][4];
  uint32_t grad[D / 16][4];
  LoadRows<D>(q, p.q, rows);
  LoadRows<D>(grad, dout, rows);
  float lse_log2[2] = {0.0F, 0.0F};
  float row_delta[2] = {0.0F, 0.0F};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!rows.valid[h]) continue;
    lse_log2[h] = lse[rows.token[h] * lse_stride + rows.head[h]] * kLog2E;
    row_delta[h] = delta[rows.token[h] * p.heads + rows.head[h]];
  }
  float sum[D / 8][4];
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[j][i] = 0.0F;
  }

  ring.ForEach(tiles, key_of, [&](int index, Bf16* keys, Bf16* values) {
    const int key = key_of(index);
    if (!takes(index, key)) return;
    const bool masked = key + kKeys - 1 > rows.lowest;
#pragma unroll 1
    for (int first = 0; first < kKeys; first += kSlice) {
      float s[kSlice / 8][4];
      float dp[kSlice / 8][4];
      MultiplyTransposed<D, kSlice>(s, q, keys, first);
      MultiplyTransposed<D, kSlice>(dp, grad, values, first);
#pragma unroll
      for (int j = 0; j < kSlice / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int h = i / 2;
          const int column = key + first + 8 * j + Lane() % 4 * 2 + i % 2;
          const float weight = ptx::Exp2(fmaf(s[j][i], p.scale_log2, -lse_log2[h]));
          const bool hidden = masked && column > rows.position[h];
          s[j][i] = hidden ? 0.0F : weight * (dp[j][i] - row_delta[h]);
        }
      }
#pragma unroll
      for (int x = 0; x < kSlice / 16; ++x) {
        uint32_t a[4];
        RoundToOperand(a, s[2 * x], s[2 * x + 1]);
        MultiplyAdd<D>(sum, a, keys, first + 16 * x);
      }
    }
  });
  const float factor[2] = {p.scale, p.scale};
  StoreRows<D>(dq, rows, sum, factor);
}

// The rows of a warp of the dense kernels: 16 consecutive tokens of one query head, `first` the
// warp's first position.
__device__ __forceinline__ QueryRows RowsOfTokens(const TokenTile& tile, int first, int head) {
  QueryRows rows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows.position[h] = first + Lane() / 4 + 8 * h;
    rows.valid[h] = rows.position[h] < tile.n;
    rows.token[h] = tile.document + rows.position[h];
    rows.head[h] = head;
  }
  rows.lowest = first;
  return rows;
}

// The rows of a warp of the sparse kernels: the heads of one group for one token.
__device__ __forceinline__ QueryRows RowsOfHeads(const TokenTile& tile, int position, int kv_head,
                                                 int group) {
  QueryRows rows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = Lane() / 4 + 8 * h;
    rows.position[h] = position;
    rows.valid[h] = position < tile.n && head < group;
    rows.token[h] = tile.document + position;
    rows.head[h] = kv_head * group + head;
  }
  rows.lowest = position;
  return rows;
}

}  // namespace sala::kernels::tile
