#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rms_norm/row.h"

namespace sala::kernels {
namespace {

SALA_INLINE void NormRowBody(int64_t n, const float* x, const float* weight, float eps, float* y,
                             float* rstd) {
  const float r = RowRstd(n, x, eps);
  *rstd = r;
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * r * weight[i];
}
constexpr Vectorized<NormRowBody> NormRow{};

SALA_INLINE void AddScaledRowBody(int64_t n, const float* residual, const float* branch,
                                  float scale, float* sum) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) sum[i] = residual[i] + scale * branch[i];
}
constexpr Vectorized<AddScaledRowBody> AddScaledRow{};

SALA_INLINE void BackwardRowBody(int64_t n, const float* dy, const float* x, const float* weight,
                                 float rstd, Write write, float* dx, float* weight_sums) {
  if (write == Write::kAccumulate) {
    RowNormBackward<true>(n, dy, x, weight, rstd, dx, weight_sums);
  } else {
    RowNormBackward<false>(n, dy, x, weight, rstd, dx, weight_sums);
  }
}
constexpr Vectorized<BackwardRowBody> BackwardRow{};

void CheckForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight,
                  const Tensor& y, const Tensor& rstd) {
  CheckCpu(ctx);
  SALA_CHECK(x.rank() == 2) << ShapeText(x);
  CheckShape(x, {x.dim(0), x.dim(1)});
  CheckVector(weight, x.dim(1));
  CheckShape(y, {x.dim(0), x.dim(1)});
  CheckVector(rstd, x.dim(0));
}

}  // namespace

void RmsNormForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight, float eps,
                    const Tensor& y, const Tensor& rstd) {
  if (ctx.cuda()) return Cuda(ctx).RmsNormForward(ctx, x, weight, eps, y, rstd);
  CheckForward(ctx, x, weight, y, rstd);
  ctx.pool->For(x.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      NormRow(x.dim(1), x.Row<float>(t), weight.Data<float>(), eps, y.Row<float>(t),
              rstd.Data<float>() + t);
    }
  });
}

void RmsNormResidualForward(const Context& ctx, const ConstTensor& residual,
                            const ConstTensor& branch, float branch_scale,
                            const ConstTensor& weight, float eps, const Tensor& sum,
                            const Tensor& y, const Tensor& rstd) {
  if (ctx.cuda()) {
    return Cuda(ctx).RmsNormResidualForward(ctx, residual, branch, branch_scale, weight, eps, sum,
                                            y, rstd);
  }
  CheckForward(ctx, sum, weight, y, rstd);
  CheckShape(residual, {sum.dim(0), sum.dim(1)});
  CheckShape(branch, {sum.dim(0), sum.dim(1)});
  ctx.pool->For(sum.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      AddScaledRow(sum.dim(1), residual.Row<float>(t), branch.Row<float>(t), branch_scale,
                   sum.Row<float>(t));
      NormRow(sum.dim(1), sum.Row<float>(t), weight.Data<float>(), eps, y.Row<float>(t),
              rstd.Data<float>() + t);
    }
  });
}

void RmsNormBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                     const ConstTensor& weight, const ConstTensor& rstd, const Tensor& dx,
                     Write write, const Tensor& dweight) {
  if (ctx.cuda()) {
    return Cuda(ctx).RmsNormBackward(ctx, dy, x, weight, rstd, dx, write, dweight);
  }
  CheckCpu(ctx);
  SALA_CHECK(x.rank() == 2) << ShapeText(x);
  const int64_t tokens = x.dim(0);
  const int64_t width = x.dim(1);
  CheckShape(x, {tokens, width});
  CheckShape(dy, {tokens, width});
  CheckVector(weight, width);
  CheckVector(rstd, tokens);
  CheckShape(dx, {tokens, width});
  if (!dweight.empty()) CheckVector(dweight, width);
  ForRowsWithSums(ctx, tokens, width, dweight, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t t = begin; t < end; ++t) {
      BackwardRow(width, dy.Row<float>(t), x.Row<float>(t), weight.Data<float>(),
                  rstd.Data<float>()[t], write, dx.Row<float>(t), sums);
    }
  });
}

}  // namespace sala::kernels
