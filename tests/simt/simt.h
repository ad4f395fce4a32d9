// Lets a host compiler compile CUDA kernels: included by kernels/common/cuda.h in place of the
// device's headers when SALA_EMULATED is defined. README.md of this folder has the rules that
// kernels obey.
//
// This file defines the qualifiers away and supplies the built-in variables and shared memory;
// simt_warp.h has barriers, warp instructions and atomics, simt_math.h the other intrinsics.
#pragma once

// CUDA's headers may come before this one (they define these) or after it (they then leave them).
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ shared_memory_comes_from_the_class_SharedMemory

#include "tests/simt/simt_core.h"
#include "tests/simt/simt_math.h"
#include "tests/simt/simt_warp.h"

#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__

// Variables, not macros: CUDA's own headers have parameters and members of these names. Set at each
// switch between threads.
extern constinit thread_local uint3 threadIdx __attribute__((tls_model("initial-exec")));
extern constinit thread_local uint3 blockIdx __attribute__((tls_model("initial-exec")));
extern constinit thread_local dim3 blockDim __attribute__((tls_model("initial-exec")));
extern constinit thread_local dim3 gridDim __attribute__((tls_model("initial-exec")));
constexpr int warpSize = 32;

namespace sala::kernels {

// The shared memory given at launch, piece by piece, each aligned to 128 bytes. All threads of a
// block take the same pieces in the same order. In emulation each piece is a heap block of its
// exact size, filled with NaN, so that reading what was not written and leaving a piece both show.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  template <typename T>
  T* Take(int64_t count, const simt::Where& where = simt::Where::current()) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    return static_cast<T*>(simt::TakeShared(next_++, bytes, where));
  }

 private:
  int next_ = 0;
};

}  // namespace sala::kernels
