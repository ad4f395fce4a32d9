// Token embedding by plain loops; contiguous arrays.
#pragma once

#include <cstdint>

namespace sala::kernels::reference {

template <typename T>
void EmbeddingForward(int64_t tokens, int64_t width, const int32_t* id, const T* weight,
                      double scale, T* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < width; ++i) out[t * width + i] = scale * weight[id[t] * width + i];
  }
}

template <typename T>
void EmbeddingBackward(int64_t tokens, int64_t width, const int32_t* id, const T* dout,
                       double scale, T* dweight) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < width; ++i) dweight[id[t] * width + i] += scale * dout[t * width + i];
  }
}

}  // namespace sala::kernels::reference
