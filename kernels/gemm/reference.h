// C = alpha * A B (+ C) by plain loops. Elements are named by strides, so one function serves NT,
// NN and TN: A(i, k) = a[i * a_row + k * a_k], B(k, j) = b[k * b_k + j * b_column].
#pragma once

#include <cstdint>

#include "kernels/common/documents.h"

namespace sala::kernels::reference {

template <typename T>
void Gemm(int64_t m, int64_t n, int64_t k, T alpha, const T* a, int64_t a_row, int64_t a_k,
          const T* b, int64_t b_k, int64_t b_column, T* c, int64_t c_row, Write write) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      T sum = 0;
      for (int64_t p = 0; p < k; ++p) sum += a[i * a_row + p * a_k] * b[p * b_k + j * b_column];
      T& out = c[i * c_row + j];
      out = write == Write::kAccumulate ? alpha * sum + out : alpha * sum;
    }
  }
}

}  // namespace sala::kernels::reference
