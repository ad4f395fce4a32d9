#include "kernels/sparse_attention/scores_math.h"

#include <algorithm>

#include "kernels/common/vector_math.h"

namespace sala::kernels {

SALA_VECTORIZE
void AccumulateLogSum(const float* scores, int64_t n, float* max, float* sum) {
  float new_max = *max;
  for (int64_t j = 0; j < n; ++j) new_max = scores[j] > new_max ? scores[j] : new_max;
  if (new_max > *max) {
    *sum *= Exp(*max - new_max);
    *max = new_max;
  }
  *sum += LaneSum<float>(n, [scores, new_max](int64_t j) { return Exp(scores[j] - new_max); });
}

SALA_VECTORIZE
void AddRelevance(const float* scores, int64_t n, float lse, float* relevance) {
  constexpr float kLimit = 80.0F;
  for (int64_t j = 0; j < n; ++j) {
    const float x = scores[j] - lse;
    relevance[j] += Exp(x < kLimit ? x : kLimit);
  }
}

}  // namespace sala::kernels
