// SwiGLU by plain loops; n elements.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>

#include "kernels/common/stored.h"

namespace sala::kernels::reference {

template <typename T>
T Sigmoid(const T& x) {
  using std::exp;
  return 1.0 / (1.0 + exp(-x));
}

// silu(gate) is stored, then the product.
template <typename T, typename Stored = Exact>
void SwiGluForward(int64_t n, const T* gate, const T* up, T* y, const Stored& stored = {}) {
  for (int64_t i = 0; i < n; ++i) y[i] = stored(stored(gate[i] * Sigmoid(gate[i])) * up[i]);
}

// silu'(x) = s + x s (1 - s), s = sigmoid(x)
template <typename T>
void SwiGluBackward(int64_t n, const T* dy, const T* gate, const T* up, T* dgate, T* dup) {
  for (int64_t i = 0; i < n; ++i) {
    const T s = Sigmoid(gate[i]);
    dgate[i] = dy[i] * up[i] * (s + gate[i] * s * (1.0 - s));
    dup[i] = dy[i] * gate[i] * s;
  }
}

}  // namespace sala::kernels::reference
