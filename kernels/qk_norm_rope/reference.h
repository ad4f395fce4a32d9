// Per-head norm and rotary embedding by plain loops; contiguous [tokens, heads, d], cos
// and sin [tokens, d / 2]. A null weight means no norm, a null cos no rotation.
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "kernels/rms_norm/reference.h"

namespace sala::kernels::reference {

// cos and sin [tokens, d / 2] of the float32 angles: float32 products of the position and of
// theta^(-2i/d), rounded to float32.
struct RopeTables {
  std::vector<double> cos, sin;
};
inline RopeTables MakeRopeTables(std::span<const int32_t> positions, int64_t d, float theta) {
  RopeTables tables;
  for (const int32_t position : positions) {
    for (int64_t i = 0; i < d / 2; ++i) {
      const auto frequency = static_cast<float>(std::pow(
          static_cast<double>(theta), -2.0 * static_cast<double>(i) / static_cast<double>(d)));
      const auto angle = static_cast<double>(static_cast<float>(position) * frequency);
      tables.cos.push_back(std::cos(angle));
      tables.sin.push_back(std::sin(angle));
    }
  }
  return tables;
}

// (a, b) -> (a c - b s, b c + a s); `direction` -1 turns back.
template <typename T, typename Stored = Exact>
void Rotate(int64_t tokens, int64_t heads, int64_t d, const double* cos, const double* sin,
            double direction, const T* x, T* y, const Stored& stored = {}) {
  const int64_t half = d / 2;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = (t * heads + h) * d;
      for (int64_t i = 0; i < half; ++i) {
        const double c = cos[t * half + i];
        const double s = direction * sin[t * half + i];
        const T a = x[at + i];
        const T b = x[at + i + half];
        y[at + i] = stored(a * c - b * s);
        y[at + i + half] = stored(b * c + a * s);
      }
    }
  }
}

template <typename T, typename Stored = Exact>
void QkNormRopeForward(int64_t tokens, int64_t heads, int64_t d, const T* x, const T* weight,
                       double eps, const double* cos, const double* sin, T* y,
                       const Stored& stored = {}) {
  std::vector<T> n(x, x + tokens * heads * d);
  if (weight != nullptr) {
    RmsNormForward(tokens * heads, d, x, weight, eps, n.data(), static_cast<T*>(nullptr), stored);
  }
  for (size_t i = 0; i < n.size(); ++i) y[i] = n[i];
  if (cos != nullptr) Rotate(tokens, heads, d, cos, sin, 1.0, n.data(), y, stored);
}

// dx overwritten, dweight [d] accumulates (null without a norm).
template <typename T>
void QkNormRopeBackward(int64_t tokens, int64_t heads, int64_t d, const T* dy, const T* x,
                        const T* weight, double eps, const double* cos, const double* sin, T* dx,
                        T* dweight) {
  std::vector<T> dn(dy, dy + tokens * heads * d);
  if (cos != nullptr) Rotate(tokens, heads, d, cos, sin, -1.0, dy, dn.data());
  if (weight != nullptr) {
    RmsNormBackward(tokens * heads, d, dn.data(), x, weight, eps, dx, dweight);
  } else {
    for (size_t i = 0; i < dn.size(); ++i) dx[i] = dn[i];
  }
}

}  // namespace sala::kernels::reference
