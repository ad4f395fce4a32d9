// Squared error by plain loops; n elements.
#pragma once

#include <cstdint>

namespace sala::kernels::reference {

template <typename T>
T SquaredError(int64_t n, const T* y, const double* target) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += (y[i] - target[i]) * (y[i] - target[i]);
  return sum;
}

inline void SquaredErrorBackward(int64_t n, const double* y, const double* target,
                                 double grad_scale, double* dy) {
  for (int64_t i = 0; i < n; ++i) dy[i] = 2 * grad_scale * (y[i] - target[i]);
}

}  // namespace sala::kernels::reference
