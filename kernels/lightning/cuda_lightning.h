// What the .cu files of Lightning attention share: the plan of segments, the arguments of their
// kernels, and the device functions for one chunk. cuda.cu has the overview.
//
// A "sweep" is one pass over the tokens that produces one output. With x, y, z and the D x D state
// M (rows: channels of y, columns: channels of z), weights w(t, u) = scale lambda^|t-u| inside a
// document and 0 otherwise, every one of the four outputs has the same form
//   result_t = sum_u w(t, u) (x_t . y_u) z_u  +  read_t M^T x_t ,    M <- pass M + sum_u write_u
//   y_u z_u^T
// per chunk, M the state on entering the chunk:
//            x    y    z   M      order of chunks   u
//   out      q    k    v   S      rising            u <= t
//   dq       dO   v    k   S^T    rising            u <= t
//   dk       v    dO   q   R^T    falling           u >= t
//   dv       k    q    dO  R      falling           u >= t
// (docs/math/lightning.md). With L tokens in the chunk, i and j counted from its first token:
//   carried(i) scale lambda^(i+1)        is read_i of a rising sweep and write_i of a falling one,
//   [j >= last] lambda^(L-1-j)           is write_j of a rising sweep and read_j of a falling one.
#pragma once

#include "kernels/common/cuda_math.h"
#include "kernels/common/ptx.h"

namespace sala::kernels::lightning {

constexpr int kChunk = 64;

// How tokens are cut. Segments are whole chunks but for the last; all others have segment_tokens.
// A function of sizes only, so that all devices give the same bits. Tokens are counted in 31 bits,
// as cu_seqlens counts them.
struct Plan {
  int tokens = 0;
  int heads = 0;
  int d = 0;
  int chunks = 0;
  int segment_tokens = 0;
  int segments = 0;
};
Plan MakePlan(int64_t tokens, int64_t heads, int64_t d);

// Device tables of one call, made by BuildTables.
struct Tables {
  // Per chunk where its tokens' documents begin, then where they end, kChunk each, counted from the
  // chunk's first token. Begin: 0 when the document began before the chunk, else 1 + its first
  // token. End: kChunk when it goes on behind the chunk. Behind the last token kChunk + 1 and 0.
  uint8_t* code = nullptr;  // [chunks, 2, kChunk]
  float* power = nullptr;   // [heads, kChunk + 1]: lambda^e
  float* through =
      nullptr;  // [heads, segments]: what a state is multiplied with on its way through
  int32_t* last_start = nullptr;   // [segments]: first token of the last token's document; -1: it
                                   // began before token 0
  int32_t* carried_end = nullptr;  // [segments]: end of the tokens whose document began before it
};
void BuildTables(const Op& op, const Plan& plan, const int32_t* cu_seqlens, int64_t documents,
                 bool carries_in, const float* slopes, const Tables& tables);

// One operand, [T, N, D] with D contiguous and heads D apart.
struct Rows {
  const Bf16* data = nullptr;
  int64_t stride = 0;
};

// The states at the segments' borders for one of S and R, [heads, segments - 1, D, D] f32 with the
// row the key's channel. In a rising sweep entry r is what enters segment r + 1, in a falling one
// what enters segment r. First comes what a segment leaves when nothing enters, then the scan.
struct BorderStates {
  Rows y, z;                     // k, v or q, dO
  const float* first = nullptr;  // [heads, D, D]: state_in or dstate_out; null: zero
  float* states = nullptr;
  bool falling = false;
  float* last = nullptr;  // [heads, D, D]: takes what leaves the last segment; BuildLastStates
};
constexpr int kMaxSweeps = 3;
struct BorderArguments {
  Plan plan;
  Tables tables;
  const float* slopes = nullptr;
  float scale = 1.0F;
  int count = 0;
  BorderStates border[2];
};
void BuildBorderStates(const Op& op, const BorderArguments& arguments);
// After BuildBorderStates: what leaves the last segment, with the bits of a march along it. `last`
// may be the memory of `first`.
void BuildLastStates(const Op& op, const BorderArguments& arguments);

struct Sweep {
  Rows x, y, z;
  Bf16* out = nullptr;
  int64_t out_stride = 0;
  const float* first = nullptr;   // enters the sweep's first segment; null: zero
  const float* states = nullptr;  // as BorderStates::states, after the scan
  float* last = nullptr;          // [heads, D, D]: takes what leaves the last segment; may be null
  int row_stride = 0;             // where M[a, b] lies in a state: a row_stride + b column_stride
  int column_stride = 0;
  bool falling = false;
};
struct MarchArguments {
  Plan plan;
  Tables tables;
  float scale = 1.0F;
  int count = 0;
  Sweep sweep[kMaxSweeps];
};
void March(const Op& op, const MarchArguments& arguments);

#if defined(__CUDACC__) || defined(SALA_EMULATED)

// A warp owns 16 columns of M, and two threads a column.
template <int D>
constexpr int kThreads = 2 * D;

// The place of a thread in its block. Now inside a loop over chunks computes it anew in each pass:
// the compiler would otherwise keep dozens of offsets that follow from it in registers across the
// loop, where the state needs them.
struct Place {
  int thread, warp, lane;

  static __device__ __forceinline__ Place Now() {
    const int thread = ptx::Opaque(static_cast<int>(threadIdx.x));
    return {thread, thread / kWarp, thread % kWarp};
  }
};

// Offset of 8 elements in a tile of rows of kWidth elements. The exclusive or spreads the 8 rows of
// an ldmatrix over all banks. Hence TileOffset(row, group ^ x) = TileOffset(row, group) ^ 8 x.
template <int kWidth>
__device__ __forceinline__ int TileOffset(int row, int group) {
  constexpr int kGroups = kWidth / 8;
  constexpr int kSpan = kGroups < 8 ? kGroups : 8;
  return row * kWidth + ((group ^ ((row * kSpan / 8) & (kSpan - 1))) * 8);
}

// Starts the copy of one head's rows of a chunk, zeros from row n on.
template <int D>
__device__ __forceinline__ void LoadTile(const Place& at, Bf16* tile, Rows rows, int chunk, int n) {
  constexpr int kGroups = D / 8;
  const Bf16* from = rows.data + int64_t{chunk} * kChunk * rows.stride;
#pragma unroll
  for (int i = 0; i < kChunk * kGroups / kThreads<D>; ++i) {
    const int item = at.thread + i * kThreads<D>;
    const int row = item / kGroups;
    const int group = item % kGroups;
    const bool valid = row < n;
    ptx::CpAsync16(tile + TileOffset<D>(row, group),
                   from + (valid ? row : 0) * rows.stride + group * 8, valid ? 16 : 0);
  }
}
constexpr int kCodes = 2 * kChunk;
__device__ __forceinline__ void LoadCodes(const Place& at, uint8_t* codes, const uint8_t* from,
                                          int chunk) {
  if (at.thread < kCodes / 16) {
    ptx::CpAsync16(codes + at.thread * 16, from + chunk * kCodes + at.thread * 16);
  }
}

__device__ __forceinline__ int TokensOfChunk(const Plan& plan, int chunk) {
  const int left = plan.tokens - chunk * kChunk;
  return left < kChunk ? left : kChunk;
}

// The factors of a chunk's tokens for reading and writing the state; `read` may be null.
template <int D>
__device__ __forceinline__ void FillFactors(const Place& at, const uint8_t* code,
                                            const float* power, float scale, bool falling, int n,
                                            float* read, float* write) {
  const int last_code = code[n - 1];
  const int last = last_code == 0 ? 0 : last_code - 1;
  for (int i = at.thread; i < kChunk; i += kThreads<D>) {
    const float left = code[i] == 0 && i < n ? scale * power[i + 1] : 0.0F;
    const float right = i >= last && i < n ? power[n - 1 - i] : 0.0F;
    if (read != nullptr) read[i] = falling ? right : left;
    write[i] = falling ? left : right;
  }
}

// This warp's columns of M, transposed: tile i holds columns g and g + 8 of the warp's (g = lane /
// 4) in rows 8 i + 2 t and 8 i + 2 t + 1 (t = lane mod 4), in the order of an accumulator. So two
// neighbouring tiles, rounded, are the B operands of x M.
template <int D>
struct StateTiles {
  float tile[D / 8][4];

  // A factor of 0 gives 0 even where the state is not finite.
  __device__ __forceinline__ void Scale(float factor) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) tile[i][c] = factor == 0.0F ? 0.0F : tile[i][c] * factor;
    }
  }
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) tile[i][c] = 0.0F;
    }
  }
  // Offset in a [D, D] state of element c of tile i.
  static __device__ __forceinline__ int Offset(const Place& at, int i, int c, int row_stride,
                                               int column_stride) {
    return (i * 8 + at.lane % 4 * 2 + c % 2) * row_stride +
           (at.warp * 16 + at.lane / 4 + c / 2 * 8) * column_stride;
  }
  __device__ __forceinline__ void Load(const Place& at, const float* from, int row_stride,
                                       int column_stride) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) tile[i][c] = from[Offset(at, i, c, row_stride, column_stride)];
    }
  }
  __device__ __forceinline__ void Store(const Place& at, float* to, int row_stride,
                                        int column_stride) const {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) to[Offset(at, i, c, row_stride, column_stride)] = tile[i][c];
    }
  }
};

// z of tokens 16 step .. + 15 in this warp's columns: z[0], z[1] and z[2], z[3] are the B operands
// of P z for its first and last 8 columns.
template <int D>
__device__ __forceinline__ void LoadZ(const Place& at, const Bf16* z_tile, int step,
                                      uint32_t (&z)[4]) {
  ptx::LdMatrix4Trans(z,
                      z_tile + TileOffset<D>(step * 16 + at.lane % 16, at.warp * 2 + at.lane / 16));
}

// Both halves of a word times a factor each. A bfloat16 is the upper half of a float32.
__device__ __forceinline__ uint32_t ScalePair(uint32_t pair, float low, float high) {
  return PackBf16(__uint_as_float(pair << 16) * low, __uint_as_float(pair & 0xffff0000U) * high);
}

// M += sum over tokens u = 16 step .. + 15 of write_u y_u z_u^T
template <int D>
__device__ __forceinline__ void AddOuterProducts(const Place& at, const Bf16* y_tile,
                                                 const float* write, int step,
                                                 const uint32_t (&z)[4], StateTiles<D>& state) {
  const float* factor = write + step * 16 + at.lane % 4 * 2;
  const uint32_t a[4] = {
      ScalePair(z[0], factor[0], factor[1]), ScalePair(z[2], factor[0], factor[1]),
      ScalePair(z[1], factor[8], factor[9]), ScalePair(z[3], factor[8], factor[9])};
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t y[4];
    ptx::LdMatrix4Trans(y, y_tile + TileOffset<D>(step * 16 + at.lane % 16, i * 2 + at.lane / 16));
    ptx::MmaBf16(state.tile[2 * i], a, y[0], y[1]);
    ptx::MmaBf16(state.tile[2 * i + 1], a, y[2], y[3]);
  }
}

// M through a chunk of n tokens, before its own tokens are added: 0 unless all of them belong to
// one document that began before the chunk, whatever M was.
template <int D>
__device__ __forceinline__ void PassChunk(const uint8_t* code, const float* power, int n,
                                          StateTiles<D>& state) {
  state.Scale(code[n - 1] == 0 ? power[n] : 0.0F);
}

#endif

}  // namespace sala::kernels::lightning
