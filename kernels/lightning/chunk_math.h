// The element-wise parts of the chunked form. Not part of the room's interface.
#pragma once

#include <cstdint>

namespace sala::kernels {

// to[r, c] = factor[r] * from[r, c]; `to` is contiguous, `from` has row stride `stride`.
void ScaleRows(int64_t rows, int64_t d, const float* factor, const float* from, int64_t stride,
               float* to);

// scores[i, j] *= power[i - j] for first[i] <= j <= i, 0 elsewhere; [n, n] with row stride
// `stride`.
void DecayScores(int64_t n, const float* power, const int64_t* first, float* scores,
                 int64_t stride);

// x[i] *= factor, i < n
void Scale(int64_t n, float factor, float* x);

// state = decay state + k v^T [d, d]; out = scale state^T q [d]
void RecurrentStep(int64_t d, float decay, float scale, const float* q, const float* k,
                   const float* v, float* state, float* out);

}  // namespace sala::kernels
