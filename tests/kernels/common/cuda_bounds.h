// Error bounds of results that a kernel works out in float32 and rounds once to bfloat16.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {

// Smallest normal bfloat16: results below it may be rounded to a multiple of the subnormal step.
constexpr double kBf16Tiny = 1e-38;

// One rounding to bfloat16 (1% for the arithmetic's effect on it), and `roundings` of float32
// relative to `size`, the sum of the absolute values of the terms. ExpectClose takes the result.
inline auto RoundedOnce(const std::vector<double>& expected, const std::vector<double>& size,
                        double roundings) {
  return [&expected, &size, roundings](size_t i) {
    return 1.01 * kBf16Round * std::abs(expected[i]) + roundings * kF32Round * size[i] + kBf16Tiny;
  };
}
// Where no terms cancel.
inline auto RoundedOnce(const std::vector<double>& expected) {
  return [&expected](size_t i) { return 1.01 * kBf16Round * std::abs(expected[i]) + kBf16Tiny; };
}

inline std::vector<double> Absolute(std::vector<double> values) {
  for (double& v : values) v = std::abs(v);
  return values;
}

}  // namespace sala::kernels
