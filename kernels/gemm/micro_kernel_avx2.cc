// 6 x 16 tiles with AVX2 and FMA: 12 sums, 2 columns and a broadcast in 16 registers.
#include "kernels/gemm/micro_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "kernels/common/vector_math.h"

#define SALA_GEMM_TARGET __attribute__((target("avx2,fma")))
#define SALA_GEMM_INLINE SALA_GEMM_TARGET SALA_INLINE

namespace sala::kernels {
namespace {

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int kRows = 6;

SALA_GEMM_INLINE Vec Zero() { return _mm256_setzero_ps(); }
SALA_GEMM_INLINE Vec Load(const float* p) { return _mm256_loadu_ps(p); }
SALA_GEMM_INLINE void Store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
SALA_GEMM_INLINE Vec Broadcast(const float* p) { return _mm256_set1_ps(*p); }
SALA_GEMM_INLINE Vec MultiplyAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
SALA_GEMM_INLINE Vec Multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
SALA_GEMM_INLINE Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }

#include "kernels/gemm/micro_kernel.inc"

}  // namespace

const MicroKernels kAvx2MicroKernels = MakeTable(std::make_integer_sequence<int, kRows>());

}  // namespace sala::kernels
#else
namespace sala::kernels {
const MicroKernels kAvx2MicroKernels = {};
}  // namespace sala::kernels
#endif
