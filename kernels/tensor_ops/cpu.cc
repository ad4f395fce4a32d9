#include <algorithm>

#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"
#include "kernels/tensor_ops/tensor_ops.h"

namespace sala::kernels {
namespace {

constexpr int64_t kGrain = 1 << 14;

void CheckFlat(const ConstTensor& a, const ConstTensor& b) {
  SALA_CHECK(a.contiguous() && b.contiguous() && a.numel() == b.numel())
      << ShapeText(a) << " and " << ShapeText(b) << " must be contiguous and of one size";
}

}  // namespace

void Cast(const Context& ctx, const ConstTensor& from, const Tensor& to) {
  if (ctx.cuda()) return Cuda(ctx).Cast(ctx, from, to);
  CheckCpu(ctx);
  CheckFlat(from, to);
  std::copy_n(from.Data<float>(), from.numel(), to.Data<float>());
}

void CopyColumns(const Context& ctx, const ConstTensor& from, const Tensor& to) {
  if (ctx.cuda()) return Cuda(ctx).CopyColumns(ctx, from, to);
  CheckCpu(ctx);
  CheckShape(to, {from.dim(0), from.dim(1)});
  ctx.pool->For(from.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      std::copy_n(from.Row<float>(t), from.dim(1), to.Row<float>(t));
  });
}

void Add(const Context& ctx, const ConstTensor& term, const Tensor& sum) {
  if (ctx.cuda()) return Cuda(ctx).Add(ctx, term, sum);
  CheckCpu(ctx);
  CheckFlat(term, sum);
  const auto* t = term.Data<float>();
  auto* s = sum.Data<float>();
  ctx.pool->For(sum.numel(), kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) s[i] += t[i];
  });
}

}  // namespace sala::kernels
