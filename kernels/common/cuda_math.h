// Device functions that several .cu files share: eight values at a time, elementary functions, sums
// over a warp and over a block in a fixed order. Row-wise kernels find more in cuda_rows.h.
#pragma once

#include "kernels/common/cuda.h"

namespace sala::kernels {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffU;

// Eight values in one 16-byte access. The address must be a multiple of 16 bytes.
struct alignas(16) Bf16x8 {
  __nv_bfloat162 pair[4];
};

__device__ __forceinline__ void Unpack(const Bf16x8& x, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __bfloat1622float2(x.pair[i]);
    values[2 * i] = two.x;
    values[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ Bf16x8 Pack(const float (&values)[8]) {
  Bf16x8 x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.pair[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  }
  return x;
}

__device__ __forceinline__ void Load8(const Bf16* from, float (&values)[8]) {
  Unpack(*reinterpret_cast<const Bf16x8*>(from), values);
}

__device__ __forceinline__ void Store8(Bf16* to, const float (&values)[8]) {
  *reinterpret_cast<Bf16x8*>(to) = Pack(values);
}

// Eight floats, in two accesses. The address must be a multiple of 16 bytes.
__device__ __forceinline__ void Load8(const float* from, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 four = reinterpret_cast<const float4*>(from)[i];
    values[4 * i] = four.x;
    values[4 * i + 1] = four.y;
    values[4 * i + 2] = four.z;
    values[4 * i + 3] = four.w;
  }
}

__device__ __forceinline__ void Store8(float* to, const float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    reinterpret_cast<float4*>(to)[i] =
        make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  }
}

// 1 / (1 + e^-x). __expf is off by 2 + |1.16 x| units in the last place of float32 (CUDA C++
// Programming Guide, mathematical functions): below 2^-16 relative wherever the result is normal, a
// hundredth of a rounding to bfloat16.
__device__ __forceinline__ float FastSigmoid(float x) { return 1.0F / (1.0F + __expf(-x)); }

// Two floats as the bits of a bfloat162, low half first: an operand register of mma.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// The sum over the lanes of a warp, on every lane; the order is that of the butterfly.
__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

__device__ __forceinline__ double WarpSum(double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// The sum over a block of whole warps, on every thread. `slots` is shared memory for one value per
// warp; all threads call this together.
template <typename T>
__device__ __forceinline__ T BlockSum(T value, T* slots) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  value = WarpSum(value);
  __syncthreads();  // slots may still be read from the call before
  if (threadIdx.x % kWarp == 0) slots[warp] = value;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < warps; ++w) sum += slots[w];
  return sum;
}

}  // namespace sala::kernels
