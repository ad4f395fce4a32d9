// IEEE binary16 ("half", F16 of model files): sign, 5 exponent bits (bias 15), 10 mantissa bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace sala {

inline float HalfToFloat(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  if (exponent == 31)
    return std::bit_cast<float>(sign | 0x7f800000U | static_cast<uint32_t>(mantissa) << 13);
  // Subnormals have exponent 1 and no leading one.
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
}

// Rounds to nearest, ties to even, overflowing to infinity; NaN stays NaN (quiet).
inline uint16_t FloatToHalf(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t size = bits & 0x7fffffffU;
  if (size > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (size >= std::bit_cast<uint32_t>(65536.0F)) return static_cast<uint16_t>(sign | 0x7c00U);
  if (size < std::bit_cast<uint32_t>(0x1p-14F)) {
    // Units of 2^-24, the smallest half; 1024 of them are the smallest normal one.
    const float units = std::nearbyint(std::ldexp(std::bit_cast<float>(size), 24));
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(units));
  }
  const uint32_t rebased = size - (112U << 23);  // bias 127 to 15
  return static_cast<uint16_t>(sign | ((rebased + 0xfffU + ((rebased >> 13) & 1U)) >> 13));
}

}  // namespace sala
