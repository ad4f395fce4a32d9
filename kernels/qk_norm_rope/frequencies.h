// The frequencies of the rotary embedding, theta^(-2i/D) for i in [0, D/2): worked out in float64
// and rounded once to float32, on the host for every device. The angles: a float32 product.
#pragma once

#include <cstdint>
#include <vector>

#include "core/elementary.h"

namespace sala::kernels {

inline std::vector<float> RopeFrequencies(int64_t head_dim, float theta) {
  std::vector<float> frequency(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequency.size(); ++i) {
    frequency[i] = static_cast<float>(PortablePow(
        static_cast<double>(theta), -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)));
  }
  return frequency;
}

// Rounded to float32, also where everything else is float64 (docs/math/token_wise.md).
inline float RopeAngle(int32_t position, float frequency) {
  return static_cast<float>(position) * frequency;
}

}  // namespace sala::kernels
