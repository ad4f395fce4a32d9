// Sums of partial results, which were just written and mostly lie in the L2 cache.
#include "kernels/common/cuda_rows.h"

namespace sala::kernels {
namespace {

constexpr int kGroups = 16;

// A warp reads 128 bytes of a row at a time.
__global__ void __launch_bounds__(kGroups* kWarp)
    AddColumnSumsKernel(const float* parts, int64_t pieces, int64_t width, float* out) {
  SharedMemory shared;
  float* sums = shared.Take<float>(kGroups * kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0.0F;
  if (column < width) {
#pragma unroll 4
    for (int64_t p = group; p < pieces; p += kGroups) sum += parts[p * width + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group != 0 || column >= width) return;
  for (int g = 1; g < kGroups; ++g) sum += sums[g * kWarp + lane];
  out[column] += sum;
}

constexpr int kSumThreads = 512;

// One block per sum: thread i adds the parts i, i + 512, ... in order.
__global__ void __launch_bounds__(kSumThreads)
    SumPartsKernel(const double* parts, int64_t count, double* totals) {
  SharedMemory shared;
  double* slots = shared.Take<double>(kSumThreads / kWarp);
  const double* mine = parts + blockIdx.x * count;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += mine[i];
  sum = BlockSum(sum, slots);
  if (threadIdx.x == 0) totals[blockIdx.x] = sum;
}

}  // namespace

void SumParts(const Op& op, const double* parts, int64_t sums, int64_t count, double* totals) {
  op.Launch(SumPartsKernel, dim3(static_cast<unsigned>(sums)), dim3(kSumThreads),
            SharedBytes<double>(kSumThreads / kWarp), parts, count, totals);
}

void AddColumnSums(const Op& op, const float* parts, int64_t pieces, int64_t width, float* out) {
  op.Launch(AddColumnSumsKernel, dim3(static_cast<unsigned>(CeilDiv(width, kWarp))),
            dim3(kGroups * kWarp), SharedBytes<float>(kGroups * kWarp), parts, pieces, width, out);
}

}  // namespace sala::kernels
