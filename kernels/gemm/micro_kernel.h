// The innermost product: a tile of C held in registers, summed over a piece of k.
// Not part of the room's interface; see gemm.h and serial.h.
#pragma once

#include <cstdint>

#include "kernels/common/instruction_set.h"

namespace sala::kernels {

enum class Finish : uint8_t {
  kRawSum,       // out = sum               (more of k follows)
  kScale,        // out = alpha * sum
  kScaleAndAdd,  // out = alpha * sum + out
};

// sum(i, j) = start(i, j) + sum_k A(i, k) B(k, j), k rising, one fused multiply-add each.
struct MicroTile {
  int64_t k = 0;
  const float* a = nullptr;  // A(i, k) = a[i * a_row + k * a_k]
  int64_t a_row = 0;
  int64_t a_k = 0;
  const float* b = nullptr;  // B(k, j) = b[k * b_k + j]
  int64_t b_k = 0;
  const float* start = nullptr;  // null: zero
  int64_t start_row = 0;
  float* out = nullptr;
  int64_t out_row = 0;
  Finish finish = Finish::kScale;
  float alpha = 1.0F;
};

using MicroKernel = void (*)(const MicroTile&);

constexpr int64_t kMaxMicroRows = 12;
constexpr int64_t kMaxMicroColumns = 32;

// kernel[r - 1][v - 1] computes r rows and v * width columns.
struct MicroKernels {
  int64_t rows = 0;   // most rows of a tile
  int64_t width = 0;  // floats of a vector; a tile has one or two
  MicroKernel kernel[kMaxMicroRows][2] = {};
};

extern const MicroKernels kPortableMicroKernels;
extern const MicroKernels kAvx2MicroKernels;  // rows = 0 where not built for x86-64
extern const MicroKernels kAvx512MicroKernels;

const MicroKernels& MicroKernelsOf(InstructionSet set);

}  // namespace sala::kernels
