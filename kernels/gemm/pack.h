// Copies of operand pieces in the order in which the micro-kernel reads them. Not part of the
// room's interface.
#pragma once

#include <cstdint>

namespace sala::kernels {

// to[k * width + j] = from[k * row + j], j < columns; zero for columns <= j < width.
void PackRows(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width, float* to);

// to[k * width + j] = from[j * row + k], j < columns; zero for columns <= j < width.
void PackTransposed(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
                    float* to);

}  // namespace sala::kernels
