// The row-wise parts of block scoring. Not part of the room's interface.
#pragma once

#include <cstdint>

namespace sala::kernels {

// Brings the running maximum and sum of exp(score - maximum) of one row to include scores[0, n).
// First: -inf and 0.
void AccumulateLogSum(const float* scores, int64_t n, float* max, float* sum);

// relevance[j] += exp(min(scores[j] - lse, 80)), j < n. The normaliser comes from the coarse keys
// and is no upper bound of the fine scores; without the limit one strong window could reach
// infinity and tie with the forced blocks.
void AddRelevance(const float* scores, int64_t n, float lse, float* relevance);

}  // namespace sala::kernels
