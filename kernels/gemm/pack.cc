#include "kernels/gemm/pack.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace sala::kernels {
namespace {

constexpr int64_t kBlock = 4;

// Transposes `to[k][0..4) = from[0..4)[k]` for four k.
void TransposeBlock(const float* from, int64_t row, int64_t width, float* to) {
#if defined(__SSE2__)
  __m128 r0 = _mm_loadu_ps(from);
  __m128 r1 = _mm_loadu_ps(from + row);
  __m128 r2 = _mm_loadu_ps(from + 2 * row);
  __m128 r3 = _mm_loadu_ps(from + 3 * row);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(to, r0);
  _mm_storeu_ps(to + width, r1);
  _mm_storeu_ps(to + 2 * width, r2);
  _mm_storeu_ps(to + 3 * width, r3);
#else
  for (int64_t p = 0; p < kBlock; ++p) {
    for (int64_t j = 0; j < kBlock; ++j) to[p * width + j] = from[j * row + p];
  }
#endif
}

void ZeroPadding(int64_t k, int64_t columns, int64_t width, float* to) {
  if (columns == width) return;
  for (int64_t p = 0; p < k; ++p) std::fill(to + p * width + columns, to + (p + 1) * width, 0.0F);
}

template <int kWidth>
void CopyRows(int64_t k, const float* from, int64_t row, float* to) {
  for (int64_t p = 0; p < k; ++p)
    std::memcpy(to + p * kWidth, from + p * row, kWidth * sizeof(float));
}

}  // namespace

void PackRows(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
              float* to) {
  switch (columns == width ? width : 0) {  // widths of whole panels
    case 6:
      return CopyRows<6>(k, from, row, to);
    case 12:
      return CopyRows<12>(k, from, row, to);
    case 16:
      return CopyRows<16>(k, from, row, to);
    case 32:
      return CopyRows<32>(k, from, row, to);
    default:
      break;
  }
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t j = 0; j < columns; ++j) to[p * width + j] = from[p * row + j];
  }
  ZeroPadding(k, columns, width, to);
}

void PackTransposed(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
                    float* to) {
  const int64_t whole_columns = columns / kBlock * kBlock;
  const int64_t whole_k = k / kBlock * kBlock;
  for (int64_t p = 0; p < whole_k; p += kBlock) {
    for (int64_t j = 0; j < whole_columns; j += kBlock) {
      TransposeBlock(from + j * row + p, row, width, to + p * width + j);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t done = j < whole_columns ? whole_k : 0;
    for (int64_t p = done; p < k; ++p) to[p * width + j] = from[j * row + p];
  }
  ZeroPadding(k, columns, width, to);
}

}  // namespace sala::kernels
