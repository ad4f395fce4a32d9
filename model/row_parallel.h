// A linear map whose input columns are cut over the tensor ranks (Megatron's row-parallel layer).
// Not part of the room's interface.
#pragma once

#include "core/context.h"
#include "model/spread.h"

namespace sala::model {

// u [T, columns of this rank], weight [H, the same columns]: alpha * (sum over ranks of u
// weight^T), this rank's part [part, H] of it, is written to or added to y.
void RowParallel(const Context& ctx, Arena& arena, const Spread& spread, const TokenShare& share,
                 const ConstTensor& u, const ConstTensor& weight, float alpha, const Tensor& y,
                 kernels::Write write);

}  // namespace sala::model
