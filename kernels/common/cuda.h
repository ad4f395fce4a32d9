// What a .cu file starts with: types, launching, shared memory, errors.
//
//   __global__ void ScaleKernel(const Bf16* x, Bf16* y, int64_t n, float a) { ... }
//
//   void Scale(const Context& ctx, const ConstTensor& x, float a, const Tensor& y) {   // cuda::
//     const Op op(ctx, "Scale", x);
//     op.Launch(ScaleKernel, dim3(blocks), dim3(256), /*shared_bytes=*/0,
//               op.Data<Bf16>(x), op.Data<Bf16>(y), x.numel(), a);
//   }
//
// Rules that let the same source run under the emulator of tests/simt (and nvcc, sm_80 to sm_120):
//   * launch through Op::Launch, never <<<>>>; shared memory only through SharedMemory;
//   * PTX only through kernels/common/ptx.h; addresses of shared memory stay pointers;
//   * no cooperative groups, no spinning on another block, no float atomics;
//   * 64-bit offsets: a 32-bit index needs a bound in a comment beside it;
//   * every element of an output is written exactly as the contract says, tails included.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#ifdef SALA_EMULATED
#include <simt.h>
#endif

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "core/check.h"
#include "core/context.h"
#include "core/cuda/cuda_device.h"
#include "core/tensor.h"

namespace sala::kernels {

using Bf16 = __nv_bfloat16;  // the bits of sala::BF16

#ifndef SALA_EMULATED
// The block's dynamic shared memory, handed out in pieces aligned to 128 bytes. All threads take
// the same pieces in the same order.
#ifdef __CUDACC__
class SharedMemory {
 public:
  __device__ __forceinline__ SharedMemory() {
    extern __shared__ __align__(128) unsigned char sala_shared[];
    next_ = sala_shared;
  }
  template <typename T>
  __device__ __forceinline__ T* Take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return piece;
  }

 private:
  unsigned char* next_;
};
#endif
#endif

// Bytes of shared memory for one piece, as SharedMemory::Take rounds it.
template <typename T>
constexpr size_t SharedBytes(int64_t count) {
  return (static_cast<size_t>(count) * sizeof(T) + 127) / 128 * 128;
}

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One call of an operation: an NVTX range for profilers, and the name and shape that an error
// message needs.
class Op {
 public:
  Op(const Context& ctx, const char* name, const ConstTensor& subject);
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;
  ~Op();

  const CudaDevice& device() const { return device_; }
  cudaStream_t stream() const { return device_.cuda_stream(); }
  bool dry() const { return device_.dry(); }

  // Throws DeviceError with the operation and its shape.
  void Check(cudaError_t result) const;

  // Device data of a tensor; aborts on a host tensor or another number type. Null for an empty one.
  template <typename T>
  T* Data(const Tensor& x) const {
    CheckTensor(x, DTypeOfDevice<T>());
    return static_cast<T*>(x.raw());
  }
  template <typename T>
  const T* Data(const ConstTensor& x) const {
    CheckTensor(x, DTypeOfDevice<T>());
    return static_cast<const T*>(x.raw());
  }

  // A grid with no blocks is no launch. `kernel` runs on the compute stream after this returns.
  template <typename... Parameters, typename... Arguments>
  void Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              Arguments&&... arguments) const {
    if (dry() || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef SALA_EMULATED
    simt::Launch(name_, grid, block, shared_bytes, stream(), kernel,
                 static_cast<Parameters>(std::forward<Arguments>(arguments))...);
#elif defined(__CUDACC__)
    // 48 KiB is what a kernel may use without asking.
    if (shared_bytes > size_t{48} << 10) {
      Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)));
    }
    // clang-format off
    kernel<<<grid, block, shared_bytes, stream()>>>(
        static_cast<Parameters>(std::forward<Arguments>(arguments))...);
    // clang-format on
#endif
    Check(cudaGetLastError());
  }

 private:
  template <typename T>
  static constexpr DType DTypeOfDevice() {
    if constexpr (std::is_same_v<T, Bf16>) {
      return DType::kBF16;
    } else {
      return DTypeOf<T>::value;
    }
  }
  void CheckTensor(const ConstTensor& x, DType dtype) const;

  CudaDevice& device_;
  const char* name_;
  ConstTensor subject_;
};

// A copy of host values in the scratch arena, on the device; lives until the caller's scope ends.
template <typename T>
const T* UploadScratch(const Context& ctx, const T* values, int64_t count) {
  if (count == 0) return nullptr;
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  void* device = ctx.scratch->Allocate(bytes);
  ctx.gpu->Upload(device, values, bytes);
  return static_cast<const T*>(device);
}

// Where the row of token 0 would lie in a tensor of rows `stride` apart whose row 0 is token
// `first`. Kernels count all tokens from token 0 and touch those from `first` on. An integer on the
// way, because no pointer may leave its array.
template <typename T>
T* FromToken(T* data, int64_t first, int64_t stride) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(data) -
                              static_cast<uintptr_t>(first * stride) * sizeof(T));
}
template <typename T, typename AnyTensor>
auto DataFromToken(const Op& op, const AnyTensor& x, int64_t first) {
  return FromToken(op.Data<T>(x), first, x.stride(0));
}

}  // namespace sala::kernels
