// dk and dv of dense and sparse attention. A block of 256 threads keeps 64 (or 16) keys: their rows
// of K and V and the sums of dk and dv stay in registers, while the rows of q and dO that attend to
// them stream through shared memory, 64 rows (token and head) a step:
//   S^T = K q^T, dP^T = V dO^T;  P = exp(scale S - lse), dS = P (dP - delta);
//   dv += P^T dO, dk += scale dS^T q
// Warps: 16 keys each; those that share keys take turns at slices of 16 rows, and their sums are
// added at the end, in order. Rows that exist in the list of tokens only are gathered: the heads of
// a group are contiguous, so a token of the released model is 4 KiB of q and of dO.
// Bound by the tensor cores and by shared memory (16 operations a byte).
#include "kernels/attention/cuda_backward.h"

namespace sala::kernels {
namespace {

using namespace tile;  // NOLINT(google-build-using-namespace)

constexpr int kStepRows = 64;
constexpr int kMostStages = 3;  // with D = 128 they fill the 99 KiB of the smaller devices

// dk or dv of all tokens, bf16 or f32.
struct KeyOutput {
  void* data = nullptr;
  int64_t stride = 0;
  bool wide = false;  // f32
};
KeyOutput KeyOutputOf(const Op& op, const Tensor& x) {
  const bool wide = x.dtype() == DType::kF32;
  return {wide ? static_cast<void*>(op.Data<float>(x)) : op.Data<Bf16>(x), x.stride(0), wide};
}
__device__ __forceinline__ void StoreKeyPair(const KeyOutput& x, int64_t offset, float low,
                                             float high) {
  if (x.wide) {
    *reinterpret_cast<float2*>(static_cast<float*>(x.data) + offset) = {low, high};
  } else {
    StorePair(static_cast<Bf16*>(x.data) + offset, low, high);
  }
}

// A row of a step: token in the document, -1 past the end of the piece; head in the group.
struct RowName {
  int32_t token;
  int32_t head;
};

__device__ __forceinline__ int TokenOfRow(const KeyTile& tile, int group, const int32_t* lists,
                                          int row, int rows) {
  if (row >= rows) return -1;
  const int index = tile.first + row / group;
  return index < tile.run ? tile.key + index : lists[tile.list + index - tile.run];
}

// The stages of a step: q [64, D], dO [64, D]; lse [64] and delta [64] in a ring of their own. What
// the kernel was called with is read from where it lies each time: registers are short.
template <int D>
class RowRing {
 public:
  static constexpr int64_t kStage = int64_t{2} * kStepRows * D;  // elements

  __device__ __forceinline__ RowRing(Bf16* memory, float* statistics)
      : memory_(memory), statistics_(statistics) {}

  __device__ __forceinline__ Bf16* Queries(int stage) { return memory_ + stage * kStage; }
  __device__ __forceinline__ Bf16* Gradients(int stage) {
    return memory_ + stage * kStage + kStepRows * D;
  }
  __device__ __forceinline__ const float* Lse(int stage) const {
    return statistics_ + stage * 2 * kStepRows;
  }
  __device__ __forceinline__ const float* Delta(int stage) const { return Lse(stage) + kStepRows; }

  // Rows without a token become zeros.
  __device__ __forceinline__ void Copy(int stage, const RowName* names, const KeyTile& tile,
                                       const Problem& p, const Input& dout, const float* lse,
                                       int64_t lse_stride, const float* delta) {
    constexpr int kChunks = D / 8;
    constexpr int kCount = kStepRows * kChunks;
#pragma unroll
    for (int start = 0; start < kCount; start += kThreads) {
      const unsigned i = start + threadIdx.x;
      if (kCount % kThreads != 0 && i >= kCount) break;
      const int row = static_cast<int>(i / kChunks);
      const int column = static_cast<int>(i % kChunks * 8);
      const RowName name = names[row];
      const int bytes = name.token < 0 ? 0 : 16;
      const int64_t token = tile.document + (name.token < 0 ? 0 : name.token);
      const int channel =
          (tile.head * p.group + name.head) * D + column;  // of at most 2^31 in a token
      ptx::CpAsync16(Queries(stage) + Place<D>(row, column),
                     p.q.data + token * p.q.stride + channel, bytes);
      ptx::CpAsync16(Gradients(stage) + Place<D>(row, column),
                     dout.data + token * dout.stride + channel, bytes);
    }
    if (threadIdx.x < 2 * kStepRows) {
      const RowName name = names[threadIdx.x % kStepRows];
      const int bytes = name.token < 0 ? 0 : 4;
      const int64_t token = tile.document + (name.token < 0 ? 0 : name.token);
      const int head = tile.head * p.group + name.head;
      const float* from = threadIdx.x < kStepRows ? lse + token * lse_stride + head
                                                  : delta + token * p.heads + head;
      ptx::CpAsync4(statistics_ + stage * 2 * kStepRows + threadIdx.x, from, bytes);
    }
  }

 private:
  Bf16* memory_;
  float* statistics_;
};

template <int D, int kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    KeyGradientKernel(Problem p, Input dout, const float* lse, int64_t lse_stride,
                      const float* delta, KeyWork work, KeyOutput dk, KeyOutput dv, float* slots,
                      int stages) {
  constexpr int kKeyGroups = kKeys / kRows;
  constexpr int kRowGroups = kWarps / kKeyGroups;
  SharedMemory shared;
  // The ring last: the addresses of the others are then known when this is compiled.
  auto* statistics = shared.Take<float>(kMostStages * 2 * kStepRows);
  auto* names = shared.Take<RowName>(2 * kStepRows);  // of two steps, by turns
  auto* shared_tile = shared.Take<KeyTile>(1);
  auto* memory = shared.Take<Bf16>(stages * RowRing<D>::kStage);

  const int parts = work.block_size / kKeys;
  const int index = static_cast<int>(blockIdx.x) / parts;
  if (work.counts != nullptr && index >= work.counts[0]) return;
  if (threadIdx.x == 0) *shared_tile = work.tiles[index];
  __syncthreads();
  const KeyTile& tile = *shared_tile;
  const int part_key = static_cast<int>(blockIdx.x) % parts * kKeys;  // in the block
  if (tile.key + part_key >= tile.n) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int key_group = WarpIndex() % kKeyGroups;
  const int row_group = WarpIndex() / kKeyGroups;
  const int lane_row = part_key + key_group * kRows + Lane() / 4;  // in the block; and + 8

  uint32_t k[D / 16][4];
  uint32_t v[D / 16][4];
  {
    const Bf16* k_rows[2];
    const Bf16* v_rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = tile.key + lane_row + 8 * h;
      const int64_t token = tile.document + key;
      const bool inside = key < tile.n;
      const int64_t channel = int64_t{tile.head} * D;
      k_rows[h] = inside ? p.k.data + token * p.k.stride + channel : nullptr;
      v_rows[h] = inside ? p.v.data + token * p.v.stride + channel : nullptr;
    }
    LoadRows<D>(k, k_rows);
    LoadRows<D>(v, v_rows);
  }
  float dk_sum[D / 8][4];
  float dv_sum[D / 8][4];
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dk_sum[j][i] = dv_sum[j][i] = 0.0F;
  }

  RowRing<D> ring(memory, statistics);
  const int rows = (tile.last - tile.first) * p.group;  // below 2^24: 2^20 tokens, 16 heads
  if (thread < kStepRows) {
    names[thread] = {TokenOfRow(tile, p.group, work.lists, thread, rows), thread % p.group};
  }
  // Steps below zero only fill the ring.
  int stage = 1;
  for (int step = 1 - stages; step * kStepRows < rows; ++step) {
    if (step >= 0) WaitForOldest(stages);
    __syncthreads();  // the step's rows and the next names are there
    const int next = step + stages - 1;
    // The tokens after the next step's are read before the copies are asked for and stored behind
    // them: that hides their latency and keeps them out of registers while products are summed.
    const int later_row = (next + 1) * kStepRows + thread;
    int later_token = 0;
    if (thread < kStepRows) later_token = TokenOfRow(tile, p.group, work.lists, later_row, rows);
    if (next * kStepRows < rows) {
      ring.Copy(stage == 0 ? stages - 1 : stage - 1, names + next % 2 * kStepRows, tile, p, dout,
                lse, lse_stride, delta);
    }
    ptx::CpAsyncCommit();
    if (thread < kStepRows) {
      names[(next + 1) % 2 * kStepRows + thread] = {later_token, later_row % p.group};
    }
    Bf16* queries = ring.Queries(stage);
    Bf16* gradients = ring.Gradients(stage);
#pragma unroll 1
    for (int slice = row_group; slice < kStepRows / 16; slice += kRowGroups) {
      const int first_row = step * kStepRows + slice * 16;
      if (step < 0 || first_row >= rows) break;
      // Weights and their product come first: the products of the other half need their registers.
      float s[2][4];
      MultiplyTransposed<D, 16>(s, k, queries, slice * 16);
      // Tokens of the list come after the block; those of the run rise, so the first decides.
      const int first_index = tile.first + first_row / p.group;
      const bool masked = first_index < tile.run && first_index < part_key + kKeys - 1;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = slice * 16 + 8 * j + Lane() % 4 * 2;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float row_lse = ring.Lse(stage)[row + c] * kLog2E;
          int position = std::numeric_limits<int>::max();  // from the start of the block
          if (masked) {
            const int token_index = tile.first + (step * kStepRows + row + c) / p.group;
            if (token_index < tile.run) position = token_index;
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int i = 2 * h + c;
            const float weight = ptx::Exp2(fmaf(s[j][i], p.scale_log2, -row_lse));
            s[j][i] = masked && lane_row + 8 * h > position ? 0.0F : weight;
          }
        }
      }
      uint32_t a[4];
      RoundToOperand(a, s[0], s[1]);
      MultiplyAdd<D>(dv_sum, a, gradients, slice * 16);
      float dp[2][4];
      MultiplyTransposed<D, 16>(dp, v, gradients, slice * 16);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = slice * 16 + 8 * j + Lane() % 4 * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dp[j][i] = s[j][i] * (dp[j][i] - ring.Delta(stage)[row + i % 2]);
        }
      }
      RoundToOperand(a, dp[0], dp[1]);
      MultiplyAdd<D>(dk_sum, a, queries, slice * 16);
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  ptx::CpAsyncWait<0>();

  // The ring's memory now takes the sums of the other row groups: two rows of [D / 8][4] for each
  // lane, at most D * 64 * 8 bytes, two stages.
  auto* buffer = reinterpret_cast<float*>(memory) + int64_t{key_group} * D * kWarp + Lane();
  for (int group = 1; group < kRowGroups; ++group) {
    __syncthreads();
    if (row_group == group) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          buffer[(4 * j + i) * kWarp] = dk_sum[j][i];
          buffer[(D / 2 + 4 * j + i) * kWarp] = dv_sum[j][i];
        }
      }
    }
    __syncthreads();
    if (row_group == 0) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dk_sum[j][i] += buffer[(4 * j + i) * kWarp];
          dv_sum[j][i] += buffer[(D / 2 + 4 * j + i) * kWarp];
        }
      }
    }
  }
  if (row_group != 0) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = tile.key + lane_row + 8 * h;
    if (key >= tile.n) continue;
    const int64_t token = tile.document + key;
    const int64_t channel = Lane() % 4 * 2;
    if (tile.slot < 0) {
      const int64_t dk_row = token * dk.stride + int64_t{tile.head} * D + channel;
      const int64_t dv_row = token * dv.stride + int64_t{tile.head} * D + channel;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        StoreKeyPair(dk, dk_row + 8 * j, dk_sum[j][2 * h] * p.scale,
                     dk_sum[j][2 * h + 1] * p.scale);
        StoreKeyPair(dv, dv_row + 8 * j, dv_sum[j][2 * h], dv_sum[j][2 * h + 1]);
      }
    } else {
      const int64_t row = lane_row + 8 * h;
      const int64_t half = int64_t{work.block_size} * D;
      float* dk_row = slots + tile.slot * 2 * half + row * D + channel;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        *reinterpret_cast<float2*>(dk_row + 8 * j) = {dk_sum[j][2 * h], dk_sum[j][2 * h + 1]};
        *reinterpret_cast<float2*>(dk_row + half + 8 * j) = {dv_sum[j][2 * h],
                                                             dv_sum[j][2 * h + 1]};
      }
    }
  }
}

// Adds the pieces of a block in order. Memory bound.
__global__ void __launch_bounds__(kThreads)
    KeySumKernel(KeyWork work, int d, float scale, const float* slots, KeyOutput dk, KeyOutput dv) {
  if (work.counts != nullptr && static_cast<int>(blockIdx.x) >= work.counts[1]) return;
  const KeySum sum = work.sums[blockIdx.x];
  const int keys = min(work.block_size, sum.n - sum.key);
  const int64_t half = int64_t{work.block_size} * d;
  for (int i = static_cast<int>(threadIdx.x) * 2; i < 2 * keys * d; i += 2 * kThreads) {
    const bool is_dv = i >= keys * d;
    const int element = is_dv ? i - keys * d : i;
    const float* from = slots + sum.slot * 2 * half + (is_dv ? half : 0) + element;
    float2 total = {0.0F, 0.0F};
    for (int s = 0; s < sum.count; ++s) {
      const float2 piece = *reinterpret_cast<const float2*>(from + s * 2 * half);
      total.x += piece.x;
      total.y += piece.y;
    }
    const int64_t token = sum.document + sum.key + element / d;
    const int64_t channel = int64_t{sum.head} * d + element % d;
    if (is_dv) {
      StoreKeyPair(dv, token * dv.stride + channel, total.x, total.y);
    } else {
      StoreKeyPair(dk, token * dk.stride + channel, total.x * scale, total.y * scale);
    }
  }
}

}  // namespace

void tile::LaunchKeyGradient(const Context& ctx, const Op& op, const Problem& problem, int64_t d,
                             const QueryGradients& x, const KeyWork& work, const Tensor& dk,
                             const Tensor& dv) {
  auto* slots =
      ctx.scratch->New(DType::kF32, {std::max<int64_t>(1, work.slots), 2 * work.block_size * d})
          .Data<float>();
  const auto launch = [&](auto size, auto keys) {
    constexpr int D = decltype(size)::value;
    constexpr int kKeys = decltype(keys)::value;
    constexpr int64_t kStage = RowRing<D>::kStage;
    constexpr size_t kOtherBytes = SharedBytes<float>(kMostStages * 2 * kStepRows) +
                                   SharedBytes<RowName>(2 * kStepRows) + SharedBytes<KeyTile>(1);
    const int stages = RingStages(op, SharedBytes<Bf16>(kStage), kOtherBytes, kMostStages);
    op.Launch(KeyGradientKernel<D, kKeys>, dim3(Blocks(work.most_tiles * work.block_size / kKeys)),
              dim3(kThreads), SharedBytes<Bf16>(stages * kStage) + kOtherBytes, problem, x.dout,
              x.lse, x.lse_stride, x.delta, work, KeyOutputOf(op, dk), KeyOutputOf(op, dv), slots,
              stages);
  };
  ForHeadSize(d, [&](auto size) {
    if (work.block_size % 64 == 0) {
      launch(size, std::integral_constant<int, 64>());
    } else {
      launch(size, std::integral_constant<int, 16>());
    }
  });
  op.Launch(KeySumKernel, dim3(Blocks(work.most_sums)), dim3(kThreads), 0, work,
            static_cast<int>(d), problem.scale, slots, KeyOutputOf(op, dk), KeyOutputOf(op, dv));
}

}  // namespace sala::kernels
