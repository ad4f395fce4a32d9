// The tile in plain C++ for processors without AVX2, fused multiply-adds included.
#include <utility>

#include "kernels/common/vector_math.h"
#include "kernels/gemm/micro_kernel.h"

#define SALA_GEMM_TARGET

namespace sala::kernels {
namespace {

constexpr int kWidth = 4;
constexpr int kRows = 2;
struct Vec {
  float x[kWidth];
};

template <typename F>
SALA_INLINE Vec Each(const F& f) {
  Vec y;
  for (int i = 0; i < kWidth; ++i) y.x[i] = f(i);
  return y;
}

SALA_INLINE Vec Zero() { return {}; }
SALA_INLINE Vec Load(const float* p) {
  return Each([&](int i) { return p[i]; });
}
SALA_INLINE void Store(float* p, const Vec& v) {
  for (int i = 0; i < kWidth; ++i) p[i] = v.x[i];
}
SALA_INLINE Vec Broadcast(const float* p) {
  return Each([&](int) { return *p; });
}
SALA_INLINE Vec MultiplyAdd(const Vec& a, const Vec& b, const Vec& c) {
  return Each([&](int i) { return FusedMultiplyAdd(a.x[i], b.x[i], c.x[i]); });
}
SALA_INLINE Vec Multiply(const Vec& a, const Vec& b) {
  return Each([&](int i) { return a.x[i] * b.x[i]; });
}
SALA_INLINE Vec Add(const Vec& a, const Vec& b) {
  return Each([&](int i) { return a.x[i] + b.x[i]; });
}

#include "kernels/gemm/micro_kernel.inc"

}  // namespace

const MicroKernels kPortableMicroKernels = MakeTable(std::make_integer_sequence<int, kRows>());

}  // namespace sala::kernels
