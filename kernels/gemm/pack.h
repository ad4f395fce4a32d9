// Copies of operand pieces in the order in which the micro-kernel reads them. Not part of the
// room's interface.
#pragma once

#include <cstdint>

namespace sala::kernels {

// Panels of `width` columns side by side: to[j / width * k * width + p * width + j % width] =
// from[p * row + j], p < k, j < columns. The last panel is filled up with zeros.
void PackRows(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width, float* to);

// One panel: to[p * width + j] = from[j * row + p], p < k, j < columns; zero for columns <= j <
// width.
void PackTransposed(int64_t k, int64_t columns, const float* from, int64_t row, int64_t width,
                    float* to);

}  // namespace sala::kernels
