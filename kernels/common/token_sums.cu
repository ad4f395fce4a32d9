// Sums of per-token numbers: a few megabytes at most, one block a field.
#include "kernels/common/cuda_softmax_row.h"

namespace sala::kernels {
namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    SumTokensKernel(const double* values, int64_t tokens, double* sums) {
  SharedMemory shared;
  double* slots = shared.Take<double>(kThreads / kWarp);
  const double* field = values + int64_t{blockIdx.x} * tokens;
  double sum = 0.0;
  for (int64_t t = threadIdx.x; t < tokens; t += kThreads) sum += field[t];
  sum = BlockSum(sum, slots);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

void SumTokens(const Op& op, const double* values, int fields, int64_t tokens, double* sums) {
  op.Launch(SumTokensKernel, dim3(static_cast<unsigned>(fields)), dim3(kThreads),
            SharedBytes<double>(kThreads / kWarp), values, tokens, sums);
}

}  // namespace sala::kernels
