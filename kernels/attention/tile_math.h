// The row-wise parts of attention tiles. Not part of the room's interface.
#pragma once

#include <cstdint>

namespace sala::kernels {

// Rows of `group` query heads per token, scores [rows, keys] with row stride `stride`. Row r sees
// the first min(keys, first_visible + r / group) keys.
struct ScoreTile {
  float* scores = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t keys = 0;
  int64_t group = 1;
  int64_t first_visible = 0;
};

// Scores become exp(score - running maximum), 0 where not visible; max, sum [rows] and o [rows, d]
// are brought to the new maximum. A row's first tile finds max = -inf, sum = 0, o = 0.
void OnlineSoftmax(const ScoreTile& tile, float* max, float* sum, float* o, int64_t d);

// Scores become P = exp(score - lse), and dp [rows, keys], same stride, becomes P (dp - delta);
// both 0 where not visible.
void SoftmaxBackward(const ScoreTile& tile, const float* lse, const float* delta, float* dp);

// delta[r] = sum_c a[r, c] b[r, c]
void RowDots(int64_t rows, int64_t d, const float* a, const float* b, float* delta);

}  // namespace sala::kernels
