// What follows a mixer before its output projection: an optional RMSNorm over the whole width, then
// an optional gate.
//   y = norm(o) * sigmoid(z)
// Softmax layers use the gate alone (weight empty), linear layers both. At least one must be
// present.
//
// On a GPU o, z, y, weight and their gradients are bf16, except for dweight, which like rstd stays
// f32. W is a multiple of 8, with a norm up to 16384; row strides are multiples of 8. Sums over a
// row are taken in float32 by a fixed tree. The backward pass takes min(ceil(T / 16), 512) W floats
// of scratch when dweight is given, and sums in an order that depends on T and W only.
//
// Cut over ranks (WidthShard) each rank has W columns of a layer of `width`, and the norm is that
// of the whole width. With a norm and T > 0 each pass exchanges once, one float32 a token: the sums
// of squares forward, the dots w dn o backward; T * 4 bytes from each rank in either pass. A sum of
// squares beyond float32 is sent as minus its 2^-160th. All else is local. Every rank gets the same
// rstd, to the bit. Scratch: 4 T (ranks + 1) bytes.
#pragma once

#include "core/context.h"
#include "kernels/common/exchange.h"

namespace sala::kernels {

struct WidthShard {
  int64_t width = 0;                       // of all ranks; 0: o.dim(1)
  const RankExchange* exchange = nullptr;  // without one all columns are here
};

// o, z f32 [T, W]; weight f32 [W] or empty (no norm); z empty: no gate -> y f32 [T, W], rstd f32
// [T] (unused without norm).
void OutputGateForward(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
                       const ConstTensor& z, float eps, const Tensor& y, const Tensor& rstd,
                       const WidthShard& shard = {});

// dout (of o) and dz overwritten (dz may be empty only if z is); dweight accumulates, may be empty.
void OutputGateBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& o,
                        const ConstTensor& weight, const ConstTensor& z, const ConstTensor& rstd,
                        const Tensor& dout, const Tensor& dz, const Tensor& dweight,
                        const WidthShard& shard = {});

// The width that the norm of `columns` columns runs over; the shard fits them.
inline int64_t NormWidth(const WidthShard& shard, int64_t columns) {
  const int64_t width = shard.width == 0 ? columns : shard.width;
  if (shard.exchange != nullptr) CheckExchange(*shard.exchange);
  SALA_CHECK(shard.exchange != nullptr ? width >= columns : width == columns)
      << columns << " columns of " << width
      << (shard.exchange == nullptr ? " without an exchange" : "");
  return width;
}

}  // namespace sala::kernels
