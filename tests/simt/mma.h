// Operands of the emulated tensor-core instructions, as a lane leaves them for its warp.
#pragma once

#include <cstdint>

#include "tests/simt/simt_core.h"

namespace simt {

struct MmaOperands {
  float* c;           // 4, read and written
  const uint32_t* a;  // 4
  uint32_t b[2];
};

struct alignas(16) MatrixRow {
  uint16_t elements[8];
  uint32_t* result;
};

// lanes.in: a lane's MmaOperands.
void MmaBf16Warp(WarpLanes& lanes);

}  // namespace simt
