// RMSNorm of one row, shared by the operations that contain it (rms_norm, qk_norm_rope,
// output_gate). Backward:
//   n_i = x_i r w_i,  r = (mean(x^2) + eps)^-1/2
//   dx_i = r (w_i dn_i - (x_i r) mean_j(w_j dn_j x_j r)),   dw_i += dn_i x_i r
// x_i r is of size 1 whatever the size of x; x_i r^3 would leave float32 from x = 1e15 on.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/vector_math.h"

namespace sala::kernels {

// sum of x^2
SALA_INLINE double RowSquare(int64_t n, const float* x) {
  return LaneSum<double>(n, [x](int64_t i) {
    const double value = x[i];
    return value * value;
  });
}

// r of a row of `width` whose squares add up to `square`.
SALA_INLINE float RstdOf(double square, int64_t width, float eps) {
  return static_cast<float>(
      1.0 / std::sqrt(square / static_cast<double>(width) + static_cast<double>(eps)));
}

SALA_INLINE float RowRstd(int64_t n, const float* x, float eps) {
  return RstdOf(RowSquare(n, x), n, eps);
}

// sum of w dn x
SALA_INLINE double RowDot(int64_t n, const float* dn, const float* x, const float* weight) {
  return LaneSum<double>(n, [=](int64_t i) {
    return static_cast<double>(dn[i] * weight[i]) * static_cast<double>(x[i]);
  });
}

// The backward pass of n columns of a row of `width` whose RowDot is `dot`. dx may be the same
// memory as dn. kAdd: dx accumulates. weight_sums (may be null) accumulates.
template <bool kAdd>
SALA_INLINE void RowNormBackward(int64_t n, const float* dn, const float* x, const float* weight,
                                 float rstd, double dot, int64_t width, float* dx,
                                 float* weight_sums) {
  const auto mean =
      static_cast<float>(dot * static_cast<double>(rstd) / static_cast<double>(width));
  if (weight_sums != nullptr) {
    SALA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) weight_sums[i] += dn[i] * (x[i] * rstd);
  }
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float value = rstd * (weight[i] * dn[i] - x[i] * rstd * mean);
    dx[i] = kAdd ? dx[i] + value : value;
  }
}

// Of a whole row.
template <bool kAdd>
SALA_INLINE void RowNormBackward(int64_t n, const float* dn, const float* x, const float* weight,
                                 float rstd, float* dx, float* weight_sums) {
  RowNormBackward<kAdd>(n, dn, x, weight, rstd, RowDot(n, dn, x, weight), n, dx, weight_sums);
}

}  // namespace sala::kernels
