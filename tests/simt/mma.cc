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

using Column = float __attribute__((vector_size(64)));  // one value for each of 16 rows

// By columns: a[k] and c[j] are columns, b[k][j] single numbers.
SIMT_VECTORIZE void Multiply(const Column (&a)[16], const float (&b)[16][8], Column (&c)[8]) {
  for (int j = 0; j < 8; j += 4) {
    Column s0 = c[j];
    Column s1 = c[j + 1];
    Column s2 = c[j + 2];
    Column s3 = c[j + 3];
    for (int k = 0; k < 16; ++k) {
      s0 += a[k] * b[k][j];
      s1 += a[k] * b[k][j + 1];
      s2 += a[k] * b[k][j + 2];
      s3 += a[k] * b[k][j + 3];
    }
    c[j] = s0;
    c[j + 1] = s1;
    c[j + 2] = s2;
    c[j + 3] = s3;
  }
}

}  // namespace

void MmaBf16Warp(WarpLanes& lanes) {
  Column a[16];
  float b[16][8];
  Column c[8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *reinterpret_cast<const MmaOperands*>(lanes.in[lane]);
    const int g = lane / 4;
    const int t = lane % 4 * 2;
    for (int part = 0; part < 4; ++part) {
      const uint32_t pair = operands.a[part];
      const int row = g + part % 2 * 8;
      const int column = t + part / 2 * 8;
      a[column][row] = Low(pair);
      a[column + 1][row] = High(pair);
    }
    for (int part = 0; part < 2; ++part) {
      const uint32_t pair = operands.b[part];
      b[t + part * 8][g] = Low(pair);
      b[t + part * 8 + 1][g] = High(pair);
      c[t][g + part * 8] = operands.c[2 * part];
      c[t + 1][g + part * 8] = operands.c[2 * part + 1];
    }
  }
  Multiply(a, b, c);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operands = *reinterpret_cast<const MmaOperands*>(lanes.in[lane]);
    const int g = lane / 4;
    const int t = lane % 4 * 2;
    for (int part = 0; part < 2; ++part) {
      operands.c[2 * part] = c[t][g + part * 8];
      operands.c[2 * part + 1] = c[t + 1][g + part * 8];
    }
  }
}

}  // namespace simt
