// Intrinsics of the device that CUDA's headers do not give to a host compiler: cached loads and
// stores, fast arithmetic, bit operations, min and max, and the rest of bf16.
//
// Fast arithmetic is exact here where the device is approximate; tolerances of tests must not lean
// on that.
#pragma once

#include <cuda_bf16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "tests/simt/simt_core.h"

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

[[noreturn]] inline void __trap(const simt::Where& where = simt::Where::current()) {
  simt::ReportAt(where, "__trap");
}

inline float rsqrtf(float x) { return 1.0F / std::sqrt(x); }

inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0F, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0F ? (x < 1.0F ? x : 1.0F) : 0.0F; }
inline float __frcp_rn(float x) { return 1.0F / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555U) | (x & 0x55555555U) << 1;
  x = (x >> 2 & 0x33333333U) | (x & 0x33333333U) << 2;
  x = (x >> 4 & 0x0f0f0f0fU) | (x & 0x0f0f0f0fU) << 4;
  return __builtin_bswap32(x);
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 15U;
    auto byte = static_cast<unsigned>(bytes >> (8 * (s & 7U)) & 255U);
    if ((s & 8U) != 0) byte = (byte & 128U) != 0 ? 255U : 0U;  // the sign of the byte
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31U)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31U));
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}
inline int __mulhi(int x, int y) { return static_cast<int>(static_cast<int64_t>(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}

// The overloads of CUDA, no more: what is ambiguous there is ambiguous here.
#define SIMT_MIN_MAX(result, first, second)    \
  constexpr result min(first a, second b) {    \
    const auto left = static_cast<result>(a);  \
    const auto right = static_cast<result>(b); \
    return right < left ? right : left;        \
  }                                            \
  constexpr result max(first a, second b) {    \
    const auto left = static_cast<result>(a);  \
    const auto right = static_cast<result>(b); \
    return left < right ? right : left;        \
  }
#define SIMT_MIN_MAX_INTEGER(type)                          \
  SIMT_MIN_MAX(type, type, type)                            \
  SIMT_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  SIMT_MIN_MAX(unsigned type, type, unsigned type)          \
  SIMT_MIN_MAX(unsigned type, unsigned type, type)
SIMT_MIN_MAX_INTEGER(int)
SIMT_MIN_MAX_INTEGER(long)
SIMT_MIN_MAX_INTEGER(long long)
#undef SIMT_MIN_MAX_INTEGER
#undef SIMT_MIN_MAX
// As fminf and fmaxf: a NaN gives way to a number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(float a, double b) { return std::fmin(double{a}, b); }
inline double max(float a, double b) { return std::fmax(double{a}, b); }
inline double min(double a, float b) { return std::fmin(a, double{b}); }
inline double max(double a, float b) { return std::fmax(a, double{b}); }

// bf16: what cuda_bf16.h keeps for device code. One rounding each.
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  // The product of two bf16 is exact in float32 and the sum in float64.
  const double product = double{__bfloat162float(a)} * double{__bfloat162float(b)};
  return __double2bfloat16(product + double{__bfloat162float(c)});
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
#define SIMT_BF16_FUNCTION(name, name2, function)           \
  inline __nv_bfloat16 name(__nv_bfloat16 a) {              \
    return __float2bfloat16(function(__bfloat162float(a))); \
  }                                                         \
  inline __nv_bfloat162 name2(__nv_bfloat162 a) { return {name(a.x), name(a.y)}; }
SIMT_BF16_FUNCTION(hexp, h2exp, std::exp)
SIMT_BF16_FUNCTION(hexp2, h2exp2, std::exp2)
SIMT_BF16_FUNCTION(hlog, h2log, std::log)
SIMT_BF16_FUNCTION(hlog2, h2log2, std::log2)
SIMT_BF16_FUNCTION(hsqrt, h2sqrt, std::sqrt)
SIMT_BF16_FUNCTION(hrsqrt, h2rsqrt, 1.0F / std::sqrt)
SIMT_BF16_FUNCTION(hrcp, h2rcp, 1.0F /)
#undef SIMT_BF16_FUNCTION
