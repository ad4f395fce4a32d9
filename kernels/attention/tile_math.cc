#include "kernels/attention/tile_math.h"

#include <bit>
#include <limits>

#include "kernels/common/vectorized.h"

namespace sala::kernels {
namespace {

// Floats in an order-preserving integer form (its own inverse). Compilers turn integer maxima into
// vector code; those of floats they do not, for the sake of NaN and signed zeros.
SALA_INLINE int32_t Ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

SALA_INLINE float RowMax(const float* x, int64_t n) {
  int32_t best = Ordered(std::bit_cast<int32_t>(-std::numeric_limits<float>::infinity()));
  for (int64_t i = 0; i < n; ++i) {
    const int32_t key = Ordered(std::bit_cast<int32_t>(x[i]));
    best = key > best ? key : best;
  }
  return std::bit_cast<float>(Ordered(best));
}

SALA_INLINE int64_t Visible(const ScoreTile& tile, int64_t row) {
  const int64_t visible = tile.first_visible + row / tile.group;
  return visible < tile.keys ? visible : tile.keys;
}

SALA_INLINE void OnlineSoftmaxBody(const ScoreTile& tile, float* max, float* sum, float* o,
                                   int64_t d) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* __restrict s = tile.scores + r * tile.stride;
    const int64_t visible = Visible(tile, r);
    const float tile_max = RowMax(s, visible);
    const float new_max = tile_max > max[r] ? tile_max : max[r];
    for (int64_t j = 0; j < visible; ++j) s[j] = Exp(s[j] - new_max);
    for (int64_t j = visible; j < tile.keys; ++j) s[j] = 0.0F;
    const float tile_sum = LaneSum<float>(visible, [s](int64_t j) { return s[j]; });
    if (new_max > max[r]) {
      const float rescale = Exp(max[r] - new_max);
      sum[r] *= rescale;
      for (int64_t c = 0; c < d; ++c) o[r * d + c] *= rescale;
      max[r] = new_max;
    }
    sum[r] += tile_sum;
  }
}

SALA_INLINE void SoftmaxBackwardBody(const ScoreTile& tile, const float* lse, const float* delta,
                                     float* dp) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    float* __restrict s = tile.scores + r * tile.stride;
    float* __restrict g = dp + r * tile.stride;
    const int64_t visible = Visible(tile, r);
    const float row_lse = lse[r];
    const float row_delta = delta[r];
    for (int64_t j = 0; j < visible; ++j) {
      const float p = Exp(s[j] - row_lse);
      s[j] = p;
      g[j] = p * (g[j] - row_delta);
    }
    for (int64_t j = visible; j < tile.keys; ++j) s[j] = g[j] = 0.0F;
  }
}

SALA_INLINE void RowDotsBody(int64_t rows, int64_t d, const float* a, const float* b,
                             float* delta) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = a + r * d;
    const float* y = b + r * d;
    delta[r] = LaneSum<float>(d, [x, y](int64_t c) { return x[c] * y[c]; });
  }
}

}  // namespace

void OnlineSoftmax(const ScoreTile& tile, float* max, float* sum, float* o, int64_t d) {
  Vectorized<OnlineSoftmaxBody>{}(tile, max, sum, o, d);
}

void SoftmaxBackward(const ScoreTile& tile, const float* lse, const float* delta, float* dp) {
  Vectorized<SoftmaxBackwardBody>{}(tile, lse, delta, dp);
}

void RowDots(int64_t rows, int64_t d, const float* a, const float* b, float* delta) {
  Vectorized<RowDotsBody>{}(rows, d, a, b, delta);
}

}  // namespace sala::kernels
