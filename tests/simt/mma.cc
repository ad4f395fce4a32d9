// mma.sync m16n8k16, A row-major, B column-major, bf16 in and float32 out.
//
// Fragments (PTX ISA): lane l has g = l / 4, t = l mod 4.
//   A [16, 16]: a[0] = (g, 2t..2t+1), a[1] = (g+8, same), a[2] = (g, 2t+8..2t+9), a[3] = (g+8,
//   same) B [16, 8]:  b0 = (2t..2t+1, g), b1 = (2t+8..2t+9, g) C [16, 8]:  c[0..1] = (g, 2t..2t+1),
//   c[2..3] = (g+8, same)
// Products are added in rising k in float32; a tensor core adds in an order of its own.
#include "tests/simt/mma.h"

#include <bit>

// One copy per instruction set; without contraction all give the same bits. This file never has a
// sanitizer, so the resolver may run early.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SIMT_VECTORIZE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SIMT_VECTORIZE
#endif

namespace simt {
namespace {

inline float Low(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float High(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000U); }

SIMT_VECTORIZE void Multiply(const float (&a)[16][16], const float (&b)[16][8], float (&c)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    float sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = c[i][j];
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sum[j] += a[i][k] * b[k][j];
    }
    for (int j = 0; j < 8; ++j) c[i][j] = sum[j];
  }
}

}  // namespace

void MmaBf16Warp(WarpLanes& lanes) {
  alignas(64) float a[16][16];
  alignas(64) float b[16][8];
  alignas(64) float c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *reinterpret_cast<const MmaOperands*>(lanes.in[lane]);
    const int g = lane / 4;
    const int t = lane % 4 * 2;
    for (int part = 0; part < 4; ++part) {
      const uint32_t pair = operands.a[part];
      float* to = &a[g + part % 2 * 8][t + part / 2 * 8];
      to[0] = Low(pair);
      to[1] = High(pair);
    }
    for (int part = 0; part < 2; ++part) {
      const uint32_t pair = operands.b[part];
      b[t + part * 8][g] = Low(pair);
      b[t + part * 8 + 1][g] = High(pair);
      c[g + part * 8][t] = operands.c[2 * part];
      c[g + part * 8][t + 1] = operands.c[2 * part + 1];
    }
  }
  Multiply(a, b, c);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *reinterpret_cast<const MmaOperands*>(lanes.in[lane]);
    const int g = lane / 4;
    const int t = lane % 4 * 2;
    for (int part = 0; part < 2; ++part) {
      operands.c[2 * part] = c[g + part * 8][t];
      operands.c[2 * part + 1] = c[g + part * 8][t + 1];
    }
  }
}

}  // namespace simt
