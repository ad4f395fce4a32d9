// The scalars of one AdamW step, worked out in float64 on the host for every device.
#pragma once

#include <cmath>

#include "core/check.h"
#include "core/elementary.h"
#include "kernels/adamw/adamw.h"

namespace sala::kernels {

// With c1 = 1 - b1^step and c2 = 1 - b2^step:
//   p -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps) + lr wd p
struct AdamWFactors {
  float grad_scale;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;    // lr / c1
  float root_factor;  // 1 / sqrt(c2)
  float eps;
  float decay;  // lr wd
};

inline AdamWFactors FactorsOf(const AdamWOptions& options) {
  SALA_CHECK(options.step >= 1) << "step " << options.step;
  const auto step = static_cast<double>(options.step);
  const double c1 = 1 - PortablePow(options.beta1, step);
  const double c2 = 1 - PortablePow(options.beta2, step);
  return {static_cast<float>(options.grad_scale),
          static_cast<float>(options.beta1),
          static_cast<float>(1 - options.beta1),
          static_cast<float>(options.beta2),
          static_cast<float>(1 - options.beta2),
          static_cast<float>(options.learning_rate / c1),
          static_cast<float>(1 / std::sqrt(c2)),
          static_cast<float>(options.eps),
          static_cast<float>(options.learning_rate * options.weight_decay)};
}

}  // namespace sala::kernels
