// RMSNorm by plain loops; contiguous [tokens, width]. T: double or std::complex<double>.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>

#include "kernels/common/stored.h"

namespace sala::kernels::reference {

// weight null: 1. rstd [tokens] may be null. The normed value is stored, then the product.
template <typename T, typename Stored = Exact>
void RmsNormForward(int64_t tokens, int64_t width, const T* x, const T* weight, double eps, T* y,
                    T* rstd, const Stored& stored = {}) {
  using std::sqrt;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = x + t * width;
    T square = 0;
    for (int64_t i = 0; i < width; ++i) square += row[i] * row[i];
    const T r = 1.0 / sqrt(square / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i) {
      const T normed = stored(row[i] * r);
      y[t * width + i] = weight != nullptr ? stored(normed * weight[i]) : normed;
    }
    if (rstd != nullptr) rstd[t] = r;
  }
}

// dx overwritten; dweight [width] accumulates, may be null. r is computed again from x.
template <typename T>
void RmsNormBackward(int64_t tokens, int64_t width, const T* dy, const T* x, const T* weight,
                     double eps, T* dx, T* dweight) {
  using std::sqrt;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = x + t * width;
    const T* drow = dy + t * width;
    T square = 0;
    for (int64_t i = 0; i < width; ++i) square += row[i] * row[i];
    const T r = 1.0 / sqrt(square / static_cast<double>(width) + eps);
    T mean = 0;
    for (int64_t i = 0; i < width; ++i) mean += drow[i] * weight[i] * row[i];
    mean /= static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) {
      dx[t * width + i] = r * weight[i] * drow[i] - r * r * r * mean * row[i];
      if (dweight != nullptr) dweight[i] += drow[i] * row[i] * r;
    }
  }
}

}  // namespace sala::kernels::reference
