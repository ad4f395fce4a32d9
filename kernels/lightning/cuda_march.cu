// The march of a sweep along one segment: one block per sweep, head and segment.
//
// The state stays in registers as float32 accumulators from the first chunk to the last; a warp
// owns 16 of its columns, transposed, so that rounded pairs of accumulators are operands of the
// next product without a way through shared memory. Per chunk
//   P = x y^T with weights, rounded to bfloat16, in shared memory
//   result = read (x M)  +  P z         M in bfloat16 as an operand
//   M = pass M + (write z)^T y          transposed; the decayed z in bfloat16
// while the next chunk's x, y, z are on their way. Shared memory with D = 128 is 106 KiB, two
// blocks on an SM that has 228 KiB; where a block gets only 99 KiB, z has one buffer instead of two
// (90 KiB) and its copy hides behind the scores alone.
//
// Bound by memory and shared memory alike: per token and head 2 D bytes for each of x, y, z and the
// result; at D = 128 about 7 KiB of shared reads and 98 K floating-point operations, fewer than a
// tensor core needs to be the limit. Blocks of one backward call that read the same rows, those of
// its three sweeps, are neighbours in the grid and find each other's rows in L2. 128 registers hold
// the state (64) and half of a chunk's result (16): two blocks of 256 threads on an SM.
#include "kernels/lightning/cuda_lightning.h"

namespace sala::kernels::lightning {
namespace {

// Whether any of rows 16 row.. may see any of columns 16 column..
__device__ __forceinline__ bool Sees(int row, int column, bool falling) {
  return falling ? column >= row : column <= row;
}

// weights[d + kChunk - 1], d = row - column: scale lambda^|d| where the column is not later
// (falling: not earlier) than the row, else 0. Exponents are never negative.
constexpr int kWeights = 2 * kChunk - 1;
template <int D>
__device__ __forceinline__ void FillWeights(const Place& at, const float* power, float scale,
                                            bool falling, float* weights) {
  for (int i = at.thread; i < kWeights; i += kThreads<D>) {
    const int d = falling ? kChunk - 1 - i : i - (kChunk - 1);
    weights[i] = d >= 0 ? scale * power[d] : 0.0F;
  }
}

// Rows 16 (item / 2) .. + 15 and columns 32 (item mod 2) .. + 31 of P.
template <int D>
__device__ __forceinline__ void ComputeScores(const Place& at, int item, const Bf16* x,
                                              const Bf16* y, const uint8_t* code,
                                              const float* weights, bool falling, Bf16* scores) {
  const int row = item / 2 * 16;
  // The lane's two rows see the columns of their own document.
  int begin[2];
  unsigned length[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = row + at.lane / 4 + h * 8;
    const int begin_code = code[r];
    begin[h] = begin_code == 0 ? 0 : begin_code - 1;
    length[h] = static_cast<unsigned>(code[kChunk + r] - begin[h]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = item % 2 * 32 + half * 16;
    float sum[2][4] = {};
    if (Sees(row / 16, column / 16, falling)) {
#pragma unroll 2
      for (int i = 0; i < D / 16; ++i) {
        uint32_t a[4], b[4];
        ptx::LdMatrix4(a, x + TileOffset<D>(row + at.lane % 16, i * 2 + at.lane / 16));
        ptx::LdMatrix4(
            b, y + TileOffset<D>(column + at.lane % 8 + at.lane / 16 * 8, i * 2 + at.lane / 8 % 2));
        ptx::MmaBf16(sum[0], a, b[0], b[1]);
        ptx::MmaBf16(sum[1], a, b[2], b[3]);
      }
    }
    const int lane_column = column + at.lane % 4 * 2;
    const float* weight = weights + (kChunk - 1) + row + at.lane / 4 - lane_column;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int s = tile * 8 + c % 2;
        const int h = c / 2;
        const bool same = static_cast<unsigned>(lane_column + s - begin[h]) < length[h];
        sum[tile][c] = same ? sum[tile][c] * weight[h * 8 - s] : 0.0F;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Bf16* to = scores + TileOffset<kChunk>(row + at.lane / 4 + h * 8, column / 8 + tile) +
                   at.lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = PackBf16(sum[tile][2 * h], sum[tile][2 * h + 1]);
      }
    }
  }
}

// Half of the chunk's rows in this warp's 16 columns: 16-row tile, 8-column tile. One half at a
// time, so that the state fits in the registers beside it.
constexpr int kHalf = kChunk / 2;
struct HalfResult {
  float tile[kHalf / 16][2][4];
};

// result = read (x M)
template <int D>
__device__ __forceinline__ void ReadState(const Place& at, int row, const Bf16* x,
                                          const float* read, const StateTiles<D>& state,
                                          HalfResult& result) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const auto& low = state.tile[2 * i];
    const auto& high = state.tile[2 * i + 1];
    const uint32_t b[4] = {PackBf16(low[0], low[1]), PackBf16(high[0], high[1]),
                           PackBf16(low[2], low[3]), PackBf16(high[2], high[3])};
#pragma unroll
    for (int m = 0; m < kHalf / 16; ++m) {
      uint32_t a[4];
      ptx::LdMatrix4(a, x + TileOffset<D>(row + m * 16 + at.lane % 16, i * 2 + at.lane / 16));
      ptx::MmaBf16(result.tile[m][0], a, b[0], b[1]);
      ptx::MmaBf16(result.tile[m][1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int m = 0; m < kHalf / 16; ++m) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float factor = read[row + m * 16 + at.lane / 4 + c / 2 * 8];
      result.tile[m][0][c] *= factor;
      result.tile[m][1][c] *= factor;
    }
  }
}

// result += P z
template <int D>
__device__ __forceinline__ void ApplyScores(const Place& at, int row, const Bf16* scores,
                                            const Bf16* z_tile, bool falling, HalfResult& result) {
#pragma unroll
  for (int i = 0; i < kChunk / 16; ++i) {
    const bool any = falling ? i * 16 >= row : i * 16 < row + kHalf;
    if (!any) continue;
    uint32_t z[4];
    LoadZ<D>(at, z_tile, i, z);
#pragma unroll
    for (int m = 0; m < kHalf / 16; ++m) {
      if (!Sees(row / 16 + m, i, falling)) continue;
      uint32_t a[4];
      ptx::LdMatrix4(
          a, scores + TileOffset<kChunk>(row + m * 16 + at.lane % 16, i * 2 + at.lane / 16));
      ptx::MmaBf16(result.tile[m][0], a, z[0], z[1]);
      ptx::MmaBf16(result.tile[m][1], a, z[2], z[3]);
    }
  }
}

// The four lanes of a row exchange words: lane t gets word t of lanes 0 .. 3.
__device__ __forceinline__ uint4 TransposeInQuad(const Place& at, const uint32_t (&word)[4]) {
  const bool odd = at.lane % 2 == 1;
  const bool upper = at.lane % 4 >= 2;
  const uint32_t a = __shfl_xor_sync(kFullMask, odd ? word[0] : word[1], 1);
  const uint32_t b = __shfl_xor_sync(kFullMask, odd ? word[2] : word[3], 1);
  const uint32_t low[2] = {odd ? a : word[0], odd ? word[1] : a};
  const uint32_t high[2] = {odd ? b : word[2], odd ? word[3] : b};
  const uint32_t c = __shfl_xor_sync(kFullMask, upper ? low[0] : high[0], 2);
  const uint32_t d = __shfl_xor_sync(kFullMask, upper ? low[1] : high[1], 2);
  return make_uint4(upper ? c : low[0], upper ? d : low[1], upper ? high[0] : c,
                    upper ? high[1] : d);
}

// 16-byte stores: lane t of a quad has row g + t / 2 * 8, column half t mod 2.
__device__ __forceinline__ void StoreResult(const Place& at, int row, const HalfResult& result,
                                            Bf16* out, int64_t stride, int n) {
  const int lane_row = row + at.lane / 4 + at.lane % 4 / 2 * 8;
  Bf16* to = out + lane_row * stride + at.warp * 16 + at.lane % 2 * 8;
#pragma unroll
  for (int m = 0; m < kHalf / 16; ++m) {
    const auto& r = result.tile[m];
    const uint32_t word[4] = {PackBf16(r[0][0], r[0][1]), PackBf16(r[1][0], r[1][1]),
                              PackBf16(r[0][2], r[0][3]), PackBf16(r[1][2], r[1][3])};
    const uint4 words = TransposeInQuad(at, word);
    // __stcg, because a plain assignment becomes four stores here
    if (m * 16 + lane_row < n) __stcg(reinterpret_cast<uint4*>(to + m * 16 * stride), words);
  }
}

// The block's own arguments. In shared memory, because registers are short and these are needed
// once per chunk.
struct BlockArguments {
  Rows x, y, z;
  Bf16* out;
  int64_t out_stride;
  float* last;      // takes the state after the last chunk; may be null
  int first_chunk;  // in the sweep's order, chunks follow each other by `direction`
  int direction;
};

template <int D>
constexpr size_t MarchSharedBytes(bool two_z) {
  return SharedBytes<BlockArguments>(1) + SharedBytes<Bf16>((two_z ? 6 : 5) * kChunk * D) +
         SharedBytes<Bf16>(kChunk * kChunk) + SharedBytes<uint8_t>(2 * kCodes) +
         SharedBytes<float>(kChunk + 1) + SharedBytes<float>(kWeights) +
         2 * SharedBytes<float>(kChunk);
}

template <int D>
__global__ void __launch_bounds__(kThreads<D>, D == 128 ? 2 : 1)
    LightningMarchKernel(const __grid_constant__ MarchArguments arguments, bool two_z) {
  constexpr int kTile = kChunk * D;
  constexpr int kItems = kChunk / 16 * 2;
  constexpr int kWarps = kThreads<D> / kWarp;
  SharedMemory shared;
  BlockArguments* block = shared.Take<BlockArguments>(1);
  Bf16* tiles = shared.Take<Bf16>((two_z ? 6 : 5) * kTile);  // two of x and y, then z
  Bf16* scores = shared.Take<Bf16>(kChunk * kChunk);
  uint8_t* codes = shared.Take<uint8_t>(2 * kCodes);
  float* power = shared.Take<float>(kChunk + 1);
  float* weights = shared.Take<float>(kWeights);
  float* read = shared.Take<float>(kChunk);
  float* write = shared.Take<float>(kChunk);

  const Plan& plan = arguments.plan;
  const Tables& tables = arguments.tables;
  const Sweep& sweep = arguments.sweep[blockIdx.x % arguments.count];
  const int item = static_cast<int>(blockIdx.x) / arguments.count;
  const int head = item % plan.heads;
  const int segment = item / plan.heads;
  const int segments = plan.segments;
  const bool falling = sweep.falling;
  const float scale = arguments.scale;
  const Place start = Place::Now();
  for (int i = start.thread; i <= kChunk; i += kThreads<D>) {
    power[i] = tables.power[head * (kChunk + 1) + i];
  }
  // Chunk numbers are below 2^25: tokens are counted in 31 bits.
  const int segment_chunks = plan.segment_tokens / kChunk;
  const int chunk_begin = segment * segment_chunks;
  const int left = plan.chunks - chunk_begin;
  const int count = left < segment_chunks ? left : segment_chunks;
  const bool is_first = segment == (falling ? segments - 1 : 0);
  const bool is_last = segment == (falling ? 0 : segments - 1);
  if (start.thread == 0) {
    const int64_t offset = int64_t{head} * D;
    *block = {{sweep.x.data + offset, sweep.x.stride},
              {sweep.y.data + offset, sweep.y.stride},
              {sweep.z.data + offset, sweep.z.stride},
              sweep.out + offset,
              sweep.out_stride,
              is_last && sweep.last != nullptr ? sweep.last + offset * D : nullptr,
              falling ? chunk_begin + count - 1 : chunk_begin,
              falling ? -1 : 1};
  }
  __syncthreads();
  FillWeights<D>(start, power, scale, falling, weights);

  const auto chunk_at = [&](int step) { return block->first_chunk + step * block->direction; };
  const auto z_at = [&](int step) { return tiles + (4 + (two_z ? step % 2 : 0)) * kTile; };
  const auto load_z = [&](const Place& at, int step) {
    const int chunk = chunk_at(step);
    LoadTile<D>(at, z_at(step), block->z, chunk, TokensOfChunk(plan, chunk));
  };
  const auto load = [&](const Place& at, int step) {
    const int chunk = chunk_at(step);
    const int n = TokensOfChunk(plan, chunk);
    Bf16* x = tiles + step % 2 * 2 * kTile;
    LoadTile<D>(at, x, block->x, chunk, n);
    LoadTile<D>(at, x + kTile, block->y, chunk, n);
    if (two_z) load_z(at, step);
    LoadCodes(at, codes + step % 2 * kCodes, tables.code, chunk);
    ptx::CpAsyncCommit();
  };
  load(start, 0);

  const float* entering = nullptr;
  if (!is_first) {
    const int64_t entry = int64_t{head} * (segments - 1) + (falling ? segment : segment - 1);
    entering = sweep.states + entry * D * D;
  } else if (sweep.first != nullptr) {
    entering = sweep.first + int64_t{head} * D * D;
  }
  StateTiles<D> state;
  bool empty = entering == nullptr;
  if (empty) {
    state.Clear();
  } else {
    state.Load(start, entering, sweep.row_stride, sweep.column_stride);
  }

#pragma unroll 1
  for (int step = 0; step < count; ++step) {
    const Place at = Place::Now();
    const int chunk = chunk_at(step);
    const int n = TokensOfChunk(plan, chunk);
    const bool more = step + 1 < count;
    const Bf16* x = tiles + step % 2 * 2 * kTile;
    const Bf16* y = x + kTile;
    const Bf16* z = z_at(step);
    const uint8_t* code = codes + step % 2 * kCodes;
    ptx::CpAsyncWait<0>();
    __syncthreads();  // x and y are there, and all have left the chunk before
    if (!two_z) {
      load_z(at, step);
      ptx::CpAsyncCommit();
    }
    if (more) load(at, step + 1);

    // Tokens whose document began before the chunk come first, if there are any.
    const bool carries = code[0] == 0;
    FillFactors<D>(at, code, power, scale, falling, n, read, write);
    for (int i = at.warp; i < kItems; i += kWarps) {
      ComputeScores<D>(at, i, x, y, code, weights, falling, scores);
    }
    if (!two_z) {
      if (more) {
        ptx::CpAsyncWait<1>();
      } else {
        ptx::CpAsyncWait<0>();
      }
    }
    __syncthreads();  // z, scores and factors are there

    const bool reads = !empty && (falling || carries);
#pragma unroll 1
    for (int row = 0; row < n; row += kHalf) {
      const Place here = Place::Now();
      HalfResult result = {};
      if (reads) ReadState<D>(here, row, x, read, state, result);
      ApplyScores<D>(here, row, scores, z, falling, result);
      StoreResult(here, row, result, block->out + int64_t{chunk} * kChunk * block->out_stride,
                  block->out_stride, n);
    }

    // What leaves the segment's last chunk is needed only at the end of the sweep.
    const bool advances = more || block->last != nullptr;
    if (advances) PassChunk<D>(code, power, n, state);
    if (advances && (!falling || carries)) {
#pragma unroll 1
      for (int i = 0; i < kChunk / 16; ++i) {
        const Place here = Place::Now();
        uint32_t tokens[4];
        LoadZ<D>(here, z, i, tokens);
        AddOuterProducts<D>(here, y, write, i, tokens, state);
      }
    }
    empty = falling && !carries;
  }
  if (block->last != nullptr) {
    state.Store(Place::Now(), block->last, sweep.row_stride, sweep.column_stride);
  }
}

template <int D>
void LaunchMarch(const Op& op, const MarchArguments& arguments) {
  const int64_t blocks = int64_t{arguments.plan.segments} * arguments.plan.heads * arguments.count;
  SALA_CHECK(blocks < int64_t{1} << 31) << blocks << " blocks";
  // A second buffer for z where it fits; smaller heads hide the copy behind other blocks.
  const bool two_z =
      D == 128 && MarchSharedBytes<D>(true) <= op.device().info().shared_bytes_per_block;
  op.Launch(LightningMarchKernel<D>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads<D>),
            MarchSharedBytes<D>(two_z), arguments, two_z);
}

}  // namespace

void March(const Op& op, const MarchArguments& arguments) {
  switch (arguments.plan.d) {
    case 16:
      LaunchMarch<16>(op, arguments);
      break;
    case 32:
      LaunchMarch<32>(op, arguments);
      break;
    case 64:
      LaunchMarch<64>(op, arguments);
      break;
    default:
      LaunchMarch<128>(op, arguments);
      break;
  }
}

}  // namespace sala::kernels::lightning
