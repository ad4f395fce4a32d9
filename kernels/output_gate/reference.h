// Norm and gate after a mixer by plain loops; contiguous [tokens, width]. A null weight
// means no norm, a null z no gate.
#pragma once

#include <vector>

#include "kernels/rms_norm/reference.h"
#include "kernels/swiglu/reference.h"

namespace sala::kernels::reference {

// The norm, the gate and their product are stored.
template <typename T, typename Stored = Exact>
void OutputGateForward(int64_t tokens, int64_t width, const T* o, const T* weight, const T* z,
                       double eps, T* y, const Stored& stored = {}) {
  std::vector<T> n(o, o + tokens * width);
  if (weight != nullptr) {
    RmsNormForward(tokens, width, o, weight, eps, n.data(), static_cast<T*>(nullptr), stored);
  }
  for (size_t i = 0; i < n.size(); ++i) {
    y[i] = z != nullptr ? stored(n[i] * stored(Sigmoid(z[i]))) : n[i];
  }
}

// dout and dz overwritten, dweight accumulates (null without a norm).
template <typename T>
void OutputGateBackward(int64_t tokens, int64_t width, const T* dy, const T* o, const T* weight,
                        const T* z, double eps, T* dout, T* dz, T* dweight) {
  std::vector<T> n(o, o + tokens * width);
  std::vector<T> dn(dy, dy + tokens * width);
  if (weight != nullptr) {
    RmsNormForward(tokens, width, o, weight, eps, n.data(), static_cast<T*>(nullptr));
  }
  if (z != nullptr) {
    for (size_t i = 0; i < n.size(); ++i) {
      const T s = Sigmoid(z[i]);
      dz[i] = dy[i] * n[i] * s * (1.0 - s);
      dn[i] = dy[i] * s;
    }
  }
  if (weight != nullptr) {
    RmsNormBackward(tokens, width, dn.data(), o, weight, eps, dout, dweight);
  } else {
    for (size_t i = 0; i < n.size(); ++i) dout[i] = dn[i];
  }
}

}  // namespace sala::kernels::reference
