// Radix sort of tokens by their rows, least significant digit of eight bits first. Three launches a
// digit: a histogram of each tile of 2048 tokens, a scan of each digit's counts over the tiles, and
// the move to the new places. Within a tile a warp takes 256 neighbouring tokens and ranks 32 at a
// time, so equal digits keep their order whatever order the blocks and warps run in. Bound by the
// latency of the launches at the sizes of a training step (3 digits for a vocabulary of 73,448).
#include "kernels/embedding/group_tokens.h"

#include "kernels/common/cuda_math.h"

namespace sala::kernels {
namespace {

constexpr int kDigits = 256;
constexpr int kThreads = 256;  // one per digit where digits are scanned
constexpr int kWarps = kThreads / kWarp;
constexpr int kRounds = 8;                       // of 32 tokens, for each warp
constexpr int kTile = kWarps * kRounds * kWarp;  // 2048

__device__ __forceinline__ int DigitOf(int32_t row, int shift) {
  return row >> shift & (kDigits - 1);
}

// counts [kDigits, tiles]
__global__ void __launch_bounds__(kThreads)
    HistogramKernel(const int32_t* ids, TableRows table, int64_t count, int shift,
                    int32_t* counts) {
  SharedMemory shared;
  int* bins = shared.Take<int>(kDigits);
  bins[threadIdx.x] = 0;
  __syncthreads();
  const int64_t end = min(count, (int64_t{blockIdx.x} + 1) * kTile);
  for (int64_t i = int64_t{blockIdx.x} * kTile + threadIdx.x; i < end; i += kThreads) {
    // Of integers: any order gives the same counts.
    atomicAdd(&bins[DigitOf(table.RowOf(ids[i]), shift)], 1);
  }
  __syncthreads();
  counts[int64_t{threadIdx.x} * gridDim.x + blockIdx.x] = bins[threadIdx.x];
}

// Exclusive sum over the threads of a block; *total receives the sum of all.
__device__ __forceinline__ int BlockScan(int value, int* slots, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int inclusive = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(kFullMask, inclusive, static_cast<unsigned>(offset));
    if (lane >= offset) inclusive += before;
  }
  __syncthreads();  // slots may still be read from the call before
  if (lane == kWarp - 1) slots[warp] = inclusive;
  __syncthreads();
  int sum = inclusive - value;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) sum += slots[w];
    *total += slots[w];
  }
  return sum;
}

// A block per digit: its counts over the tiles become their exclusive sums, and totals[digit] the
// sum of all.
__global__ void __launch_bounds__(kThreads)
    ScanKernel(int32_t* counts, int64_t tiles, int32_t* totals) {
  SharedMemory shared;
  int* slots = shared.Take<int>(kWarps);
  int32_t* row = counts + int64_t{blockIdx.x} * tiles;
  int sum = 0;
  for (int64_t first = 0; first < tiles; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    int total;
    const int before = BlockScan(i < tiles ? row[i] : 0, slots, &total);
    if (i < tiles) row[i] = sum + before;
    sum += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}

// positions null: the tokens still stand where they came in.
__global__ void __launch_bounds__(kThreads)
    MoveKernel(const int32_t* ids, TableRows table, const int32_t* positions, int64_t count,
               int shift, const int32_t* counts, const int32_t* totals, int32_t* to_rows,
               int32_t* to_positions) {
  SharedMemory shared;
  int* slots = shared.Take<int>(kWarps);
  int* places = shared.Take<int>(kWarps * kDigits);  // [warp, digit]: counts, then first places
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int* mine = places + warp * kDigits;
  for (int d = lane; d < kDigits; d += kWarp) mine[d] = 0;
  __syncwarp();

  const int64_t first = int64_t{blockIdx.x} * kTile + warp * (kRounds * kWarp) + lane;
  int32_t row[kRounds];
  int rank[kRounds];  // among the warp's tokens of the same digit
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = first + round * kWarp;
    row[round] = i < count ? table.RowOf(ids[i]) : 0;
    const int digit = i < count ? DigitOf(row[round], shift) : -1;
    const unsigned same = __match_any_sync(kFullMask, digit);
    const int before = __popc(same & ((1U << lane) - 1));
    rank[round] = digit >= 0 ? mine[digit] + before : 0;
    __syncwarp();
    if (digit >= 0 && before == 0) mine[digit] += __popc(same);
    __syncwarp();
  }
  __syncthreads();

  // Thread d: the first place of digit d for each warp.
  const int digit = static_cast<int>(threadIdx.x);
  int all;
  int place = BlockScan(totals[digit], slots, &all);
  place += counts[int64_t{digit} * gridDim.x + blockIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    const int of_warp = places[w * kDigits + digit];
    places[w * kDigits + digit] = place;
    place += of_warp;
  }
  __syncthreads();

#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = first + round * kWarp;
    if (i >= count) continue;
    const int to = mine[DigitOf(row[round], shift)] + rank[round];
    to_rows[to] = row[round];
    to_positions[to] = positions != nullptr ? positions[i] : static_cast<int32_t>(i);
  }
}

}  // namespace

GroupedTokens GroupTokens(const Context& ctx, const Op& op, const int32_t* ids, int64_t count,
                          const TableRows& table) {
  SALA_CHECK(count < (int64_t{1} << 31) - kTile) << count << " tokens";
  const int64_t tiles = CeilDiv(count, kTile);
  int32_t* sorted[2];
  int32_t* places[2];
  for (int i = 0; i < 2; ++i) {
    sorted[i] = op.Data<int32_t>(ctx.scratch->New(DType::kI32, {count}));
    places[i] = op.Data<int32_t>(ctx.scratch->New(DType::kI32, {count}));
  }
  int32_t* counts = op.Data<int32_t>(ctx.scratch->New(DType::kI32, {kDigits, tiles}));
  int32_t* totals = op.Data<int32_t>(ctx.scratch->New(DType::kI32, {kDigits}));

  const dim3 grid(static_cast<unsigned>(tiles));
  GroupedTokens now = {ids, nullptr};
  TableRows rows = table;
  int to = 0;
  // Rows 0 to table.count, the last for ids outside.
  for (int shift = 0; shift == 0 || table.count >= int64_t{1} << shift; shift += 8) {
    op.Launch(HistogramKernel, grid, dim3(kThreads), SharedBytes<int>(kDigits), now.rows, rows,
              count, shift, counts);
    op.Launch(ScanKernel, dim3(kDigits), dim3(kThreads), SharedBytes<int>(kWarps), counts, tiles,
              totals);
    op.Launch(MoveKernel, grid, dim3(kThreads),
              SharedBytes<int>(kWarps) + SharedBytes<int>(kWarps * kDigits), now.rows, rows,
              now.positions, count, shift, counts, totals, sorted[to], places[to]);
    now = {sorted[to], places[to]};
    rows.first = 0;
    to = 1 - to;
  }
  return now;
}

}  // namespace sala::kernels
