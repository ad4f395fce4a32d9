#include "kernels/sparse_attention/scores_math.h"

#include <algorithm>

#include "kernels/common/vectorized.h"

namespace sala::kernels {
namespace {

SALA_INLINE void AccumulateLogSumBody(const float* scores, int64_t n, float* max, float* sum) {
  float new_max = *max;
  for (int64_t j = 0; j < n; ++j) new_max = scores[j] > new_max ? scores[j] : new_max;
  if (new_max > *max) {
    *sum *= Exp(*max - new_max);
    *max = new_max;
  }
  *sum += LaneSum<float>(n, [scores, new_max](int64_t j) { return Exp(scores[j] - new_max); });
}

SALA_INLINE void AddRelevanceBody(const float* scores, int64_t n, float lse, float* relevance) {
  constexpr float kLimit = 80.0F;
  for (int64_t j = 0; j < n; ++j) {
    const float x = scores[j] - lse;
    relevance[j] += Exp(x < kLimit ? x : kLimit);
  }
}

}  // namespace

void AccumulateLogSum(const float* scores, int64_t n, float* max, float* sum) {
  Vectorized<AccumulateLogSumBody>{}(scores, n, max, sum);
}

void AddRelevance(const float* scores, int64_t n, float lse, float* relevance) {
  Vectorized<AddRelevanceBody>{}(scores, n, lse, relevance);
}

}  // namespace sala::kernels
