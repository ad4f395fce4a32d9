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

constexpr int64_t kFloatsOfLine = 16;  // of a cache line
// Each row of `from` may lie in another page, where no processor guesses ahead.
constexpr int64_t kRowsAhead = 12;

// Whole panels; a row of `from` is read once from end to end.
template <int kWidth>
void CopyPanels(int64_t k, int64_t columns, const float* from, int64_t row, float* to) {
  for (int64_t p = 0; p < k; ++p) {
    const float* source = from + p * row;
    const float* ahead = from + std::min(p + kRowsAhead, k - 1) * row;
    for (int64_t j = 0; j < columns; j += kFloatsOfLine) __builtin_prefetch(ahead + j);
    float* panel = to + p * kWidth;
    for (int64_t j = 0; j + kWidth <= columns; j += kWidth, panel += k * kWidth) {
      std::memcpy(panel, source + j, kWidth * sizeof(float));
    }
  }
}

// The same for a width that is known at run time only.
void CopyPanelsOfAnyWidth(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
                          float* to) {
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t j = 0; j < columns; j += width) {
      std::copy_n(from + p * row + j, std::min(width, columns - j), to + j * k + p * width);
    }
  }
}

}  // namespace

void PackRows(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
              float* to) {
  const int64_t whole = columns / width * width;
  switch (width) {  // those of the micro-kernels
    case 6:
      CopyPanels<6>(k, whole, from, row, to);
      break;
    case 12:
      CopyPanels<12>(k, whole, from, row, to);
      break;
    case 16:
      CopyPanels<16>(k, whole, from, row, to);
      break;
    case 32:
      CopyPanels<32>(k, whole, from, row, to);
      break;
    default:
      CopyPanelsOfAnyWidth(k, whole, from, row, width, to);
      break;
  }
  if (whole == columns) return;
  CopyPanelsOfAnyWidth(k, columns - whole, from + whole, row, width, to + whole * k);
  ZeroPadding(k, columns - whole, width, to + whole * k);
}

void PackTransposed(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
                    float* to) {
  const int64_t whole_columns = columns / kBlock * kBlock;
  const int64_t whole_k = k / kBlock * kBlock;
  // Along k first: each cache line of `from` is used up before the next one, also where rows lie a
  // multiple of a page apart and would drive each other out.
  for (int64_t j = 0; j < whole_columns; j += kBlock) {
    for (int64_t p = 0; p < whole_k; p += kBlock) {
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
