// The logit scale by a plain formula.
#pragma once

#include <cmath>
#include <cstdint>

namespace sala::kernels::reference {

// s_t = log(t + a) / log(a)
inline double LogitScale(int64_t t, double a) {
  return std::log(static_cast<double>(t) + a) / std::log(a);
}

}  // namespace sala::kernels::reference
