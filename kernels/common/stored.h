// How a reference keeps a value between two operations: as it is, or as code that stores bfloat16
// tensors has it. The references take either as their last argument.
#pragma once

#include "core/dtype.h"

namespace sala::kernels::reference {

struct Exact {
  template <typename T>
  const T& operator()(const T& x) const {
    return x;
  }
};

// Rounded to float32 first: such code works an operation out in float32 and rounds its result.
struct RoundedToBf16 {
  double operator()(double x) const { return static_cast<float>(BF16(static_cast<float>(x))); }
};

}  // namespace sala::kernels::reference
