// Rows of logits: the largest one, and sums over exponentials. Shared by cross_entropy and
// kl_divergence.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernels/common/vector_math.h"

namespace sala::kernels {

// Elements summed in float32 (kLanes partial sums) before the sum goes on in float64.
constexpr int64_t kSumBlock = 1024;

SALA_INLINE float RowMax(int64_t n, const float* x) {
  float lane[kLanes];
  for (float& l : lane) l = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  }
  for (; i < n; ++i) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
  float largest = lane[0];
  for (float l : lane) largest = l > largest ? l : largest;
  return largest;
}

// The lowest index that holds `value`; n where there is none (a row of NaN).
inline int64_t FirstIndexOf(int64_t n, const float* x, float value) {
  return std::find(x, x + n, value) - x;
}

// x_i <- e^(x_i - largest); returns their sum.
SALA_INLINE double ExpRow(int64_t n, float largest, float* x) {
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    float* block = x + begin;
    const int64_t count = std::min(kSumBlock, n - begin);
    SALA_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) block[i] = Exp(block[i] - largest);
    sum += static_cast<double>(LaneSum<float>(count, [block](int64_t i) { return block[i]; }));
  }
  return sum;
}

// The same sum, bit for bit, of a row that stays as it is.
SALA_INLINE double ExpSum(int64_t n, float largest, const float* x) {
  double sum = 0;
  float block[kSumBlock];
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t count = std::min(kSumBlock, n - begin);
    std::copy_n(x + begin, count, block);
    sum += ExpRow(count, largest, block);
  }
  return sum;
}

// What a part of a row is measured against: nothing stands above minus infinity in a part that is
// empty or all overflow, and 0 keeps its terms at 0 (and a NaN a NaN).
SALA_INLINE float ShiftOf(float largest) {
  return largest == -std::numeric_limits<float>::infinity() ? 0.0F : largest;
}

}  // namespace sala::kernels
