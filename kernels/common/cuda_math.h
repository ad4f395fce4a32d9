// Device functions that several .cu files share: eight values at a time, elementary functions, sums
// over a warp and over a block in a fixed order. Row-wise kernels find more in cuda_rows.h.
#pragma once

#include "kernels/common/cuda.h"

namespace sala::kernels {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffU;

// Two floats as the bits of a bfloat162, low half first: an operand register of mma.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Eight bfloat16 values, moved by one 16-byte access: from an array of __nv_bfloat162 the compiler
// makes four or eight narrower ones, so they are kept as words. Addresses are multiples of 16
// bytes.
struct Bf16x8 {
  uint4 words;
};

__device__ __forceinline__ Bf16x8 LoadPack(const Bf16* from) {
  return {*reinterpret_cast<const uint4*>(from)};
}

// __stcg, because a plain assignment is split in four stores where the words are computed one by
// one.
__device__ __forceinline__ void StorePack(Bf16* to, const Bf16x8& x) {
  __stcg(reinterpret_cast<uint4*>(to), x.words);
}

__device__ __forceinline__ void Unpack(const Bf16x8& x, float (&values)[8]) {
  const uint32_t words[4] = {x.words.x, x.words.y, x.words.z, x.words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000U);
  }
}

__device__ __forceinline__ Bf16x8 Pack(const float (&values)[8]) {
  return {make_uint4(PackBf16(values[0], values[1]), PackBf16(values[2], values[3]),
                     PackBf16(values[4], values[5]), PackBf16(values[6], values[7]))};
}

__device__ __forceinline__ void Load8(const Bf16* from, float (&values)[8]) {
  Unpack(LoadPack(from), values);
}

__device__ __forceinline__ void Store8(Bf16* to, const float (&values)[8]) {
  StorePack(to, Pack(values));
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
