// What the softmax losses share on the GPU: one block reads one row of float32 logits, eight at a
// time and a thread. Rows are multiples of 8 elements long in memory, whatever their count `n` is;
// what lies between n and that is read and counts as minus infinity.
#pragma once

#include "kernels/common/cuda_math.h"
#include "kernels/common/vocabulary_shard.h"

namespace sala::kernels {

// Threads of a block that works on a row; a step of the block takes kRowStep elements.
constexpr int kLogitThreads = 512;
constexpr int kRowStep = kLogitThreads * 8;

// Shared memory of a block: one slot a warp. At most 2^31 - kRowStep elements in a row, so that
// columns are ints.
struct RowSlots {
  double* sums;
  float* values;
  int* columns;
};
constexpr size_t kRowSlotBytes = SharedBytes<double>(kLogitThreads / kWarp) +
                                 SharedBytes<float>(kLogitThreads / kWarp) +
                                 SharedBytes<int>(kLogitThreads / kWarp);
__device__ __forceinline__ RowSlots TakeRowSlots(SharedMemory& shared) {
  RowSlots slots;
  slots.sums = shared.Take<double>(kLogitThreads / kWarp);
  slots.values = shared.Take<float>(kLogitThreads / kWarp);
  slots.columns = shared.Take<int>(kLogitThreads / kWarp);
  return slots;
}

constexpr float kMinusInfinity = -__builtin_huge_valf();
constexpr int kNoColumn = 0x7fffffff;

// Columns [column, column + 8) of a row of n, column < n.
__device__ __forceinline__ void LoadLogits8(const float* row, int column, int n,
                                            float (&values)[8]) {
  const float4 low = *reinterpret_cast<const float4*>(row + column);
  const float4 high = *reinterpret_cast<const float4*>(row + column + 4);
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  if (column + 8 > n) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (column + j >= n) values[j] = kMinusInfinity;
    }
  }
}

// Largest value, its lowest column, and sum of exp(value - largest) of what one thread has seen,
// in one pass: when a larger value comes the sum is scaled (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018). A NaN among the values makes the sum NaN.
struct OnlineSoftmax {
  float largest = kMinusInfinity;
  int column = kNoColumn;
  float sum = 0.0F;

  __device__ __forceinline__ void Add8(const float (&values)[8], int first_column) {
    const float before = largest;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (values[j] > largest) {
        largest = values[j];
        column = first_column + j;
      }
    }
    // Only minus infinity so far: any finite number gives exp(value) = 0 without a NaN.
    const float shift = largest == kMinusInfinity ? 0.0F : largest;
    if (largest > before) sum *= __expf(before - shift);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += __expf(values[j] - shift);
  }
};

struct RowSoftmax {
  float largest;
  int column;  // the lowest where the largest stands; kNoColumn if nothing is above minus infinity
  double sum;  // of exp(value - largest); NaN when the row has a NaN or no finite value
};

// What all threads of the block have seen, on every thread. The threads' sums are brought to the
// common largest value once and added in float64 in the order of BlockSum.
__device__ __forceinline__ RowSoftmax CombineRow(const OnlineSoftmax& mine, const RowSlots& slots) {
  RowSoftmax row = {mine.largest, mine.column, 0.0};
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float value = __shfl_xor_sync(kFullMask, row.largest, offset);
    const int column = __shfl_xor_sync(kFullMask, row.column, offset);
    if (value > row.largest || (value == row.largest && column < row.column)) {
      row.largest = value;
      row.column = column;
    }
  }
  __syncthreads();  // the slots may still be read from the call before
  if (threadIdx.x % kWarp == 0) {
    slots.values[threadIdx.x / kWarp] = row.largest;
    slots.columns[threadIdx.x / kWarp] = row.column;
  }
  __syncthreads();
  for (int w = 0; w < kLogitThreads / kWarp; ++w) {
    const float value = slots.values[w];
    const int column = slots.columns[w];
    if (value > row.largest || (value == row.largest && column < row.column)) {
      row.largest = value;
      row.column = column;
    }
  }
  row.sum = BlockSum(double{mine.sum * __expf(mine.largest - row.largest)}, slots.sums);
  return row;
}

// The device's forms of what vocabulary_shard.h has for the host.

// What a block has seen of a row of which other ranks have the rest, thread 0's to write. `row` is
// of columns; the message has ids.
__device__ __forceinline__ void PutShare(const RowSoftmax& row, int64_t first_row, float* fields) {
  fields[kLargestLogit] = row.largest;
  SplitDouble(row.sum, fields + kSumHigh);
  const int id = row.column == kNoColumn ? kNoId : static_cast<int>(first_row) + row.column;
  fields[kArgMaxBits] = __int_as_float(id);
}

// As CombineRow, for a part of a row: where nothing stands above minus infinity the sum is that of
// the terms themselves, 0 or NaN. The whole block.
__device__ __forceinline__ RowSoftmax CombinePart(const OnlineSoftmax& mine,
                                                  const RowSlots& slots) {
  RowSoftmax part = CombineRow(mine, slots);
  if (part.largest == kMinusInfinity) part.sum = BlockSum(double{mine.sum}, slots.sums);
  return part;
}

// The whole row, columns being ids, from the shares of all ranks, `distance` floats apart.
__device__ __forceinline__ RowSoftmax JoinRow(const float* fields, int ranks, int64_t distance) {
  RowSoftmax row = {kMinusInfinity, kNoColumn, 0.0};
  for (int k = 0; k < ranks; ++k) {
    const float largest = fields[k * distance + kLargestLogit];
    const int id = __float_as_int(fields[k * distance + kArgMaxBits]);
    if (largest > row.largest || (largest == row.largest && id < row.column)) {
      row.largest = largest;
      row.column = id;
    }
  }
  for (int k = 0; k < ranks; ++k) {
    const float* share = fields + k * distance;
    row.sum +=
        JoinDouble(share + kSumHigh) * exp(double{share[kLargestLogit]} - double{row.largest});
  }
  return row;
}

// sums[f] = sum over tokens of values[f * tokens + t], f < fields, in float64 in an order that
// depends on `tokens` only. All on the device.
void SumTokens(const Op& op, const double* values, int fields, int64_t tokens, double* sums);

// The distance of rows of n float32 logits: whole packs of 8, so that every row and every row of
// bfloat16 gradients written over it starts at a multiple of 16 bytes.
constexpr int64_t LogitStride(int64_t n) { return CeilDiv(n, 8) * 8; }

}  // namespace sala::kernels
