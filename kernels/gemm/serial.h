// The same products on raw pointers, one thread, for use inside other kernels' loops (attention
// tiles, linear-attention chunks). Same order of summation and same bits as gemm.h. CPU only.
#pragma once

#include <cstdint>

#include "kernels/common/documents.h"

namespace sala::kernels {

// ld*: elements between rows of the matrix as stored. See gemm.h for the shapes of NT, NN, TN.
// `workspace` holds packed panels: GemmSerialWorkspace(m, n, k) floats, 64-byte aligned.
int64_t GemmSerialWorkspace(int64_t m, int64_t n, int64_t k);
void GemmSerialNT(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float* c, int64_t ldc, Write write,
                  float* workspace);
void GemmSerialNN(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float* c, int64_t ldc, Write write,
                  float* workspace);
void GemmSerialTN(int64_t m, int64_t n, int64_t k, float alpha, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float* c, int64_t ldc, Write write,
                  float* workspace);

}  // namespace sala::kernels
