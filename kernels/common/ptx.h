// The instructions of the device that have no name in CUDA C++, as small functions. No other file
// has inline assembly. All are in sm_80 and later.
//
// Addresses of shared memory are plain pointers here and everywhere in kernels; they become 32-bit
// addresses inside. When kernels are emulated on the host (SALA_EMULATED) every function has a twin
// in tests/simt/simt_ptx.h, tested against the layouts below.
//
// Fragments of MmaBf16, C [16, 8] += A [16, 16] B [16, 8], for lane l with g = l / 4, t = l mod 4
// (two bf16 in a word, the one with the lower index in the lower half):
//   a[0] = A(g, 2t..2t+1)   a[1] = A(g+8, 2t..2t+1)   a[2] = A(g, 2t+8..2t+9)   a[3] = A(g+8,
//   2t+8..) b0 = B(2t..2t+1, g)     b1 = B(2t+8..2t+9, g) c[0..1] = C(g, 2t..2t+1)   c[2..3] =
//   C(g+8, 2t..2t+1)
// LdMatrix reads 8x8 matrices of 16-bit elements. Lane 8 m + r gives the address of row r of matrix
// m, 16 bytes, aligned to 16; r[m] of lane l becomes M_m(g, 2t..2t+1), with Trans M_m(2t..2t+1, g).
// With two matrices the addresses of lanes 16 and up are not used (but must be aligned and valid
// under nvcc all the same: give any).
//   A fragment from row-major A: lane l gives &A[l % 16][l / 16 * 8], LdMatrix4.
//   Two B fragments (n and n+8) from B stored [N][K]: &B[l % 8 + l / 16 * 8][l / 8 % 2 * 8],
//   LdMatrix4; from B stored [K][N]: &B[l % 16][l / 16 * 8], LdMatrix4Trans. Then b0, b1 = r[0],
//   r[1] and r[2], r[3].
// All lanes of the warp must take part in both.
//
// CpAsync16 and CpAsync4 copy from global to shared memory in the background, both addresses
// aligned to the size; bytes from valid_bytes on become zero, and with 0 nothing is read.
// CpAsyncCommit makes a group of the copies since the last one; CpAsyncWait<n> waits until at most
// the n newest groups of this thread are on their way. Other threads see the data after a barrier
// that follows the wait. All groups must have been waited for when the kernel ends.
#pragma once

#ifdef SALA_EMULATED
#include <simt_ptx.h>
#else

#include <cstdint>

namespace sala::kernels::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void LdMatrix4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(shared))
               : "memory");
}
__device__ __forceinline__ void LdMatrix4Trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(shared))
               : "memory");
}
__device__ __forceinline__ void LdMatrix2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(SharedAddress(shared))
               : "memory");
}
__device__ __forceinline__ void LdMatrix2Trans(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(SharedAddress(shared))
               : "memory");
}

__device__ __forceinline__ void CpAsync16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(SharedAddress(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void CpAsync4(void* shared, const void* global, int valid_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(SharedAddress(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void CpAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kKeep>
__device__ __forceinline__ void CpAsyncWait() {
  static_assert(kKeep >= 0);
  asm volatile("cp.async.wait_group %0;" ::"n"(kKeep) : "memory");
}

// x, but the compiler does not know it: what is computed from the result is computed there, not
// ahead of a loop and kept in a register.
__device__ __forceinline__ int Opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Base-2 exponential and logarithm and the reciprocal in one instruction: about 2 units in the last
// place (log2 near 1: 2^-22 absolute), subnormal numbers are zero.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace sala::kernels::ptx

#endif
