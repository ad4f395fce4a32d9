// Kernels that are right, for the emulator's own tests and its benchmark: a matrix product on
// tensor cores with a pipeline of asynchronous copies, and a row normalisation with warp shuffles.
#pragma once

#include <cuda_bf16.h>
#include <simt.h>

#include "kernels/common/ptx.h"

namespace simt_samples {

namespace ptx = sala::kernels::ptx;

constexpr int kTile = 64;
constexpr int kGemmThreads = 128;
constexpr int kGemmSharedBytes = 2 * 2 * kTile * kTile * 2;

// C [M, N] = A [M, K] B [N, K]^T, bf16 to float32; K a multiple of 64. One block has 64x64 of C,
// each of its four warps 32x32. Rows of shared memory are 128 bytes; the 16-byte pieces of a row
// are permuted so that ldmatrix meets different banks.
inline __global__ void __launch_bounds__(kGemmThreads)
    GemmKernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  sala::kernels::SharedMemory shared;
  auto* shared_a = shared.Take<__nv_bfloat16>(2 * kTile * kTile);
  auto* shared_b = shared.Take<__nv_bfloat16>(2 * kTile * kTile);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int m0 = static_cast<int>(blockIdx.y) * kTile;
  const int n0 = static_cast<int>(blockIdx.x) * kTile;
  const int warp_m = warp % 2 * 32;
  const int warp_n = warp / 2 * 32;
  auto at = [](__nv_bfloat16* base, int row, int column) {
    return base + row * kTile + ((column / 8) ^ (row % 8)) * 8;
  };
  auto load = [&](int step) {
    const int stage = step % 2 * kTile * kTile;
    for (int piece = thread; piece < kTile * kTile / 8; piece += kGemmThreads) {
      const int row = piece / 8;
      const int column = piece % 8 * 8;
      const int from_m = m0 + row < m ? m0 + row : 0;
      const int from_n = n0 + row < n ? n0 + row : 0;
      ptx::CpAsync16(at(shared_a + stage, row, column),
                     a + static_cast<int64_t>(from_m) * k + step * kTile + column,
                     m0 + row < m ? 16 : 0);
      ptx::CpAsync16(at(shared_b + stage, row, column),
                     b + static_cast<int64_t>(from_n) * k + step * kTile + column,
                     n0 + row < n ? 16 : 0);
    }
    ptx::CpAsyncCommit();
  };
  float sums[2][4][4] = {};
  const int steps = k / kTile;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      ptx::CpAsyncWait<1>();
    } else {
      ptx::CpAsyncWait<0>();
    }
    __syncthreads();
    __nv_bfloat16* tile_a = shared_a + step % 2 * kTile * kTile;
    __nv_bfloat16* tile_b = shared_b + step % 2 * kTile * kTile;
#pragma unroll
    for (int inner = 0; inner < kTile; inner += 16) {
      uint32_t fragment_a[2][4];
      uint32_t fragment_b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::LdMatrix4(fragment_a[i],
                       at(tile_a, warp_m + i * 16 + lane % 16, inner + lane / 16 * 8));
        ptx::LdMatrix4(fragment_b[i], at(tile_b, warp_n + i * 16 + lane % 8 + lane / 16 * 8,
                                         inner + lane / 8 % 2 * 8));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ptx::MmaBf16(sums[i][j], fragment_a[i], fragment_b[j / 2][j % 2 * 2],
                       fragment_b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int part = 0; part < 4; ++part) {
        const int row = m0 + warp_m + i * 16 + lane / 4 + part / 2 * 8;
        const int column = n0 + warp_n + j * 8 + lane % 4 * 2 + part % 2;
        if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = sums[i][j][part];
      }
    }
  }
}

// y = x / sqrt(mean(x^2) + eps) of each row of n; one block per row.
template <typename T>
__global__ void NormKernel(const T* x, T* y, int n, float eps) {
  sala::kernels::SharedMemory shared;
  auto* partial = shared.Take<float>(32);
  const T* row = x + static_cast<int64_t>(blockIdx.x) * n;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float sum = 0.0F;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    const auto value = static_cast<float>(row[i]);
    sum += value * value;
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0U, sum, offset);
  if (lane == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = lane < warps ? partial[lane] : 0.0F;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0U, sum, offset);
  const float scale = rsqrtf(sum / static_cast<float>(n) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    y[static_cast<int64_t>(blockIdx.x) * n + i] = T(static_cast<float>(row[i]) * scale);
  }
}

}  // namespace simt_samples
