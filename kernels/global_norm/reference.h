// Sum of squares by one plain loop, for tests.
#pragma once

#include <cstdint>

namespace sala::kernels::reference {

template <typename T>
T SumOfSquares(int64_t n, const T* x) {
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

}  // namespace sala::kernels::reference
