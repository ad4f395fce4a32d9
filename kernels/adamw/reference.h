// AdamW as its formula reads, for tests (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/adamw/adamw.h"

namespace sala::kernels::reference {

inline void AdamWStep(int64_t n, const double* grad, double* param, double* m, double* v,
                      const AdamWOptions& o) {
  for (int64_t i = 0; i < n; ++i) {
    const double g = o.grad_scale * grad[i];
    m[i] = o.beta1 * m[i] + (1 - o.beta1) * g;
    v[i] = o.beta2 * v[i] + (1 - o.beta2) * g * g;
    const double m_hat = m[i] / (1 - std::pow(o.beta1, static_cast<double>(o.step)));
    const double v_hat = v[i] / (1 - std::pow(o.beta2, static_cast<double>(o.step)));
    param[i] -= o.learning_rate * (m_hat / (std::sqrt(v_hat) + o.eps) + o.weight_decay * param[i]);
  }
}

}  // namespace sala::kernels::reference
