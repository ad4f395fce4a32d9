#include "model/row_parallel.h"

#include "kernels/gemm/gemm.h"

namespace sala::model {

void RowParallel(const Context& ctx, Arena& arena, const Spread& spread, const TokenShare& share,
                 const ConstTensor& u, const ConstTensor& weight, float alpha, const Tensor& y,
                 kernels::Write write) {
  if (spread.tp_size() == 1) {
    kernels::GemmNT(ctx, u, weight, y, {.alpha = alpha, .write = write});
    return;
  }
  const ArenaScope scope(arena);
  const Tensor terms = arena.New(DType::kF32, {u.dim(0), weight.dim(0)});
  kernels::GemmNT(ctx, u, weight, terms, {.alpha = alpha});
  spread.Sum(ctx, arena, share, terms, y, write);
}

}  // namespace sala::model
