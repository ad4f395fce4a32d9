// RMSNorm of one row, shared by the operations that contain it (rms_norm, qk_norm_rope,
// output_gate). Backward:
//   n_i = x_i r w_i,  r = (mean(x^2) + eps)^-1/2
//   dx_i = r w_i dn_i - x_i r^3 mean_j(w_j dn_j x_j),   dw_i += dn_i x_i r
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/vector_math.h"

namespace sala::kernels {

SALA_INLINE float RowRstd(int64_t n, const float* x, float eps) {
  const auto square = LaneSum<double>(n, [x](int64_t i) {
    const double value = x[i];
    return value * value;
  });
  return static_cast<float>(1.0 /
                            std::sqrt(square / static_cast<double>(n) + static_cast<double>(eps)));
}

// dx may be the same memory as dn. kAdd: dx accumulates. weight_sums (may be null) accumulates.
template <bool kAdd>
SALA_INLINE void RowNormBackward(int64_t n, const float* dn, const float* x, const float* weight,
                                 float rstd, float* dx, float* weight_sums) {
  const auto dot = LaneSum<double>(n, [=](int64_t i) {
    return static_cast<double>(dn[i] * weight[i]) * static_cast<double>(x[i]);
  });
  const double r = rstd;
  const auto slope = static_cast<float>(dot * r * r * r / static_cast<double>(n));
  if (weight_sums != nullptr) {
    SALA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) weight_sums[i] += dn[i] * (x[i] * rstd);
  }
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float value = rstd * (weight[i] * dn[i]) - slope * x[i];
    dx[i] = kAdd ? dx[i] + value : value;
  }
}

}  // namespace sala::kernels
