// General matrix multiply on row-major matrices, float32 on a CPU.
//
// Shapes in the field's notation: A and B are stored as named, the product is C [M, N].
//   GemmNT: A [M, K], B [N, K]   C = A B^T     y = x W^T          (weights are stored [out, in])
//   GemmNN: A [M, K], B [K, N]   C = A B       dx = dy W
//   GemmTN: A [K, M], B [K, N]   C = A^T B     dW = dy^T x
// Rows may be strided views (stride(0) >= columns); no transposed copies are needed.
//
// Order of summation: every element of C has one float32 accumulator and adds its K products in
// rising k with fused multiply-add; alpha is applied once to the finished sum, and with
// Write::kAccumulate the old C is added last: C = alpha * sum + C. The bits of an element therefore
// do not depend on M, N, strides, slicing, thread count or vector width (AVX-512, AVX2 and the
// portable form agree). Source of the rule: docs/decisions.md.
//
// On a GPU (cuBLASLt): A and B bf16; C bf16 or f32, rounded once from a float32 sum. What is added
// to a bf16 C may be rounded to bf16 before: on an H100 the library does so. Rows start at
// multiples of 16 bytes; widths are free. The order of a sum is the library's, the same each time
// for the same shape, strides and device: bits do depend on the shape. Scratch: 32 MiB, 64 MiB on
// sm_90. An error of the library is a DeviceError.
#pragma once

#include "core/context.h"
#include "kernels/common/documents.h"

namespace sala::kernels {

struct GemmOptions {
  float alpha = 1.0F;
  Write write = Write::kOverwrite;
};

// C is overwritten, or accumulated with Write::kAccumulate, also where K = 0. C must not overlap A
// or B.
void GemmNT(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
            const GemmOptions& options = {});
void GemmNN(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
            const GemmOptions& options = {});
void GemmTN(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
            const GemmOptions& options = {});

}  // namespace sala::kernels
