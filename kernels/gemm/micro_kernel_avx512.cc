// 12 x 32 tiles with AVX-512: 24 sums, 2 columns and a broadcast in 32 registers.
#include "kernels/gemm/micro_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "kernels/common/vector_math.h"

#define SALA_GEMM_TARGET __attribute__((target("avx512f")))
#define SALA_GEMM_INLINE SALA_GEMM_TARGET SALA_INLINE

namespace sala::kernels {
namespace {

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int kRows = 12;

SALA_GEMM_INLINE Vec Zero() { return _mm512_setzero_ps(); }
SALA_GEMM_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
SALA_GEMM_INLINE void Store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
SALA_GEMM_INLINE Vec Broadcast(const float* p) { return _mm512_set1_ps(*p); }
SALA_GEMM_INLINE Vec MultiplyAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SALA_GEMM_INLINE Vec Multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SALA_GEMM_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }

#include "kernels/gemm/micro_kernel.inc"

}  // namespace

const MicroKernels kAvx512MicroKernels = MakeTable(std::make_integer_sequence<int, kRows>());

}  // namespace sala::kernels
#else
namespace sala::kernels {
const MicroKernels kAvx512MicroKernels = {};
}  // namespace sala::kernels
#endif
