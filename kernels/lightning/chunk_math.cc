#include "kernels/lightning/chunk_math.h"

#include "kernels/common/vectorized.h"

namespace sala::kernels {
namespace {

SALA_INLINE void ScaleRowsBody(int64_t rows, int64_t d, const float* factor, const float* from,
                               int64_t stride, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = from + r * stride;
    float* y = to + r * d;
    const float f = factor[r];
    for (int64_t c = 0; c < d; ++c) y[c] = f * x[c];
  }
}

SALA_INLINE void DecayScoresBody(int64_t n, const float* power, const int64_t* first, float* scores,
                                 int64_t stride) {
  for (int64_t i = 0; i < n; ++i) {
    float* s = scores + i * stride;
    for (int64_t j = 0; j < first[i]; ++j) s[j] = 0.0F;
    for (int64_t j = first[i]; j <= i; ++j) s[j] *= power[i - j];
    for (int64_t j = i + 1; j < n; ++j) s[j] = 0.0F;
  }
}

SALA_INLINE void ScaleBody(int64_t n, float factor, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

SALA_INLINE void RecurrentStepBody(int64_t d, float decay, float scale, const float* q,
                                   const float* k, const float* v, float* state, float* out) {
  for (int64_t b = 0; b < d; ++b) out[b] = 0.0F;
  for (int64_t a = 0; a < d; ++a) {
    float* row = state + a * d;
    const float key = k[a];
    const float query = scale * q[a];
    for (int64_t b = 0; b < d; ++b) {
      row[b] = decay * row[b] + key * v[b];
      out[b] += query * row[b];
    }
  }
}

}  // namespace

void ScaleRows(int64_t rows, int64_t d, const float* factor, const float* from, int64_t stride,
               float* to) {
  Vectorized<ScaleRowsBody>{}(rows, d, factor, from, stride, to);
}

void DecayScores(int64_t n, const float* power, const int64_t* first, float* scores,
                 int64_t stride) {
  Vectorized<DecayScoresBody>{}(n, power, first, scores, stride);
}

void Scale(int64_t n, float factor, float* x) { Vectorized<ScaleBody>{}(n, factor, x); }

void RecurrentStep(int64_t d, float decay, float scale, const float* q, const float* k,
                   const float* v, float* state, float* out) {
  Vectorized<RecurrentStepBody>{}(d, decay, scale, q, k, v, state, out);
}

}  // namespace sala::kernels
