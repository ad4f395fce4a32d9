// Checks of shapes at the door of a kernel, and a sum over rows that threads do not change.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "core/check.h"
#include "core/context.h"

namespace sala::kernels {

// Rows of a token-wise operation that one thread takes at a time. Fixed: partial results are kept
// per piece.
constexpr int64_t kRowGrain = 32;

inline void CheckCpu(const Context& ctx) {
  SALA_CHECK(ctx.device == DeviceKind::kCpu) << "this form runs on the CPU";
  SALA_CHECK(ctx.pool != nullptr && ctx.scratch != nullptr) << "incomplete context";
}

inline void CheckShape(const ConstTensor& x, std::initializer_list<int64_t> shape,
                       DType dtype = DType::kF32) {
  bool same = x.rank() == static_cast<int>(shape.size()) && x.dtype() == dtype;
  int d = 0;
  for (int64_t n : shape) {
    same = same && x.dim(d) == n;
    ++d;
  }
  SALA_CHECK(same) << "found " << ShapeText(x) << ", expected "
                   << ShapeText(ConstTensor(nullptr, dtype, shape));
}

inline void CheckVector(const ConstTensor& x, int64_t n, DType dtype = DType::kF32) {
  CheckShape(x, {n}, dtype);
  SALA_CHECK(n <= 1 || x.stride(0) == 1) << "vector with stride " << x.stride(0);
}

// Calls body(begin, end, sums) for pieces of `rows`; what the pieces add to their own sums [width]
// (zero at first) is added to `total` [width] in the order of the pieces. With an empty total, sums
// is null.
template <typename Body>
void ForRowsWithSums(const Context& ctx, int64_t rows, int64_t width, const Tensor& total,
                     const Body& body) {
  if (total.empty()) {
    ctx.pool->For(rows, kRowGrain, [&](int64_t begin, int64_t end) {
      body(begin, end, static_cast<float*>(nullptr));
    });
    return;
  }
  const ArenaScope scope(*ctx.scratch);
  const int64_t pieces = (rows + kRowGrain - 1) / kRowGrain;
  auto* sums = ctx.scratch->NewZeroed(DType::kF32, {pieces * width}).template Data<float>();
  ctx.pool->For(rows, kRowGrain, [&](int64_t begin, int64_t end) {
    body(begin, end, sums + begin / kRowGrain * width);
  });
  auto* out = total.template Data<float>();
  for (int64_t p = 0; p < pieces; ++p) {
    for (int64_t i = 0; i < width; ++i) out[i] += sums[p * width + i];
  }
}

}  // namespace sala::kernels
