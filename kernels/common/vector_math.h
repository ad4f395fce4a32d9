// Elementary functions and sums for loops over float arrays (kernels/common/vectorized.h).
//
// They are free of branches, calls and fused multiply-adds, so a loop over them becomes vector code
// and has the same bits for every vector width (the project compiles with -ffp-contract=off). Sums
// keep a fixed number of partial sums, whatever the width, and join them in a fixed tree.
#pragma once

#include <bit>
#include <cstdint>

// Before an element-wise loop whose arrays are either apart or exactly the same memory.
#if defined(__clang__)
#define SALA_INDEPENDENT
#else
#define SALA_INDEPENDENT _Pragma("GCC ivdep")
#endif

// For functions that must become part of every copy of their caller.
#define SALA_INLINE __attribute__((always_inline)) inline

namespace sala::kernels {

// e^x, at most 2 units in the last place off while the result is normal. -inf gives 0, above 88.73
// inf, NaN NaN; results below the normal range are rounded to it gradually. x = n ln2 + r with |r|
// <= ln2 / 2; ln2 in two parts, the first short enough for n * first to be exact; e^r by its Taylor
// polynomial of degree 7, whose remainder r^8 / 8! is below 2^-27 of the result; 2^n in two factors
// so that neither leaves the exponent range.
SALA_INLINE float Exp(float x) {
  constexpr float kRound =
      12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x > 89.0F ? 89.0F : x;
  x = x < -104.0F ? -104.0F : x;
  const float shifted = x * 1.44269504F + kRound;
  const float n = shifted - kRound;
  const uint32_t bits = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound);
  const float r = (x - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.0F / 5040;
  p = p * r + 1.0F / 720;
  p = p * r + 1.0F / 120;
  p = p * r + 1.0F / 24;
  p = p * r + 1.0F / 6;
  p = p * r + 0.5F;
  p = (p * r * r + r) + 1.0F;
  const auto exponent = static_cast<int32_t>(bits);
  const int32_t half = exponent >> 1;
  const auto first = static_cast<uint32_t>(half) + 127U;
  const auto second = bits - static_cast<uint32_t>(half) + 127U;
  return p * std::bit_cast<float>(first << 23) * std::bit_cast<float>(second << 23);
}

// 1 / (1 + e^-x)
SALA_INLINE float Sigmoid(float x) { return 1.0F / (1.0F + Exp(-x)); }

// a * b + c rounded once: std::fma, which processors without the instruction leave to a slow
// function. The product is exact in float64. Of the two float64 numbers around the sum the one with
// an odd last bit is taken ("round to odd"), so that rounding to float32 sees on which side of a
// midpoint the exact sum lies (Boldo and Melquiond, "Emulation of a FMA and correctly rounded
// sums", 2008).
SALA_INLINE float FusedMultiplyAdd(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double added = c;
  const double sum = product + added;
  const double from_added = sum - product;
  const double lost = (product - (sum - from_added)) + (added - from_added);
  const auto bits = std::bit_cast<int64_t>(sum);
  const auto inexact = static_cast<int64_t>(lost > 0) | static_cast<int64_t>(lost < 0);
  const int64_t away = (lost > 0) == (sum > 0) ? 1 : -1;
  return static_cast<float>(std::bit_cast<double>(bits + (inexact & ~bits) * away));
}

constexpr int64_t kLanes = 16;

// ((0+8) + (4+12)) + ... : the fixed tree over the partial sums.
template <typename S>
SALA_INLINE S JoinLanes(S (&lane)[kLanes]) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  }
  return lane[0];
}

// sum of term(i) over i in [0, n): term i goes to partial sum i mod kLanes. S is the type of the
// sums.
template <typename S, typename Term>
SALA_INLINE S LaneSum(int64_t n, const Term& term) {
  S lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += term(i + l);
  }
  for (; i < n; ++i) lane[i % kLanes] += term(i);
  return JoinLanes(lane);
}

}  // namespace sala::kernels
