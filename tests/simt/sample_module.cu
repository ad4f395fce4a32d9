// A shared library with a kernel, as the trainer's module has them: loaded by module_test.cc.
#include <simt.h>

#include "kernels/common/ptx.h"

namespace {

__global__ void ReverseKernel(const int* in, int* out) {
  sala::kernels::SharedMemory shared;
  const int n = static_cast<int>(blockDim.x);
  const int i = static_cast<int>(threadIdx.x);
  int* copy = shared.Take<int>(n);
  sala::kernels::ptx::CpAsync4(copy + i, in + i);
  sala::kernels::ptx::CpAsyncCommit();
  sala::kernels::ptx::CpAsyncWait<0>();
  __syncthreads();
  out[i] = __shfl_sync(~0U, copy[n - 1 - i], i % 32);
}

}  // namespace

// out[i] = in[n - 1 - i] on host arrays. Returns a cudaError_t.
extern "C" int SimtSampleReverse(const int* in, int* out, int n) {
  int* device = nullptr;
  const size_t bytes = sizeof(int) * static_cast<size_t>(n);
  cudaMalloc(reinterpret_cast<void**>(&device), 2 * bytes);
  cudaMemcpyAsync(device, in, bytes, cudaMemcpyHostToDevice, nullptr);
  simt::Launch("reverse", dim3(1), dim3(static_cast<unsigned>(n)), bytes + 128, nullptr,
               ReverseKernel, device, device + n);
  cudaMemcpyAsync(out, device + n, bytes, cudaMemcpyDeviceToHost, nullptr);
  cudaDeviceSynchronize();
  cudaFree(device);
  return static_cast<int>(cudaGetLastError());
}
