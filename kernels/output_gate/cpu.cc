#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/rms_norm/row.h"

namespace sala::kernels {
namespace {

// In the row functions a null weight means no norm, a null z no gate.

SALA_VECTORIZE void ForwardRow(int64_t n, const float* o, const float* weight, const float* z,
                               float eps, float* y, float* rstd) {
  const float* gated = o;
  if (weight != nullptr) {
    const float r = RowRstd(n, o, eps);
    *rstd = r;
    SALA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) y[i] = o[i] * r * weight[i];
    gated = y;
  }
  if (z == nullptr) return;
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = gated[i] * Sigmoid(z[i]);
}

// dout = dy sigmoid(z), the gradient of the normed value; dz = dy n s (1 - s).
SALA_VECTORIZE void GateBackwardRow(int64_t n, const float* dy, const float* o, const float* weight,
                                    const float* z, float rstd, float* dout, float* dz) {
  if (weight == nullptr) {
    SALA_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const float s = Sigmoid(z[i]);
      dz[i] = dy[i] * o[i] * (s * (1.0F - s));
      dout[i] = dy[i] * s;
    }
    return;
  }
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float s = Sigmoid(z[i]);
    dz[i] = dy[i] * (o[i] * rstd * weight[i]) * (s * (1.0F - s));
    dout[i] = dy[i] * s;
  }
}

SALA_VECTORIZE void NormBackwardRow(int64_t n, const float* dn, const float* o, const float* weight,
                                    float rstd, float* dout, float* weight_sums) {
  RowNormBackward<false>(n, dn, o, weight, rstd, dout, weight_sums);
}

void Check(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
           const ConstTensor& z, const ConstTensor& rstd) {
  CheckCpu(ctx);
  SALA_CHECK(o.rank() == 2) << ShapeText(o);
  CheckShape(o, {o.dim(0), o.dim(1)});
  SALA_CHECK(o.numel() == 0 || !weight.empty() || !z.empty()) << "neither norm nor gate";
  if (!weight.empty()) {
    CheckVector(weight, o.dim(1));
    CheckVector(rstd, o.dim(0));
  }
  if (!z.empty()) CheckShape(z, {o.dim(0), o.dim(1)});
}

template <typename TensorType>
auto RowOrNull(const TensorType& x, int64_t t) {
  return x.empty() ? nullptr : x.template Row<float>(t);
}

}  // namespace

void OutputGateForward(const Context& ctx, const ConstTensor& o, const ConstTensor& weight,
                       const ConstTensor& z, float eps, const Tensor& y, const Tensor& rstd) {
  if (ctx.cuda()) return Cuda(ctx).OutputGateForward(ctx, o, weight, z, eps, y, rstd);
  Check(ctx, o, weight, z, rstd);
  CheckShape(y, {o.dim(0), o.dim(1)});
  ctx.pool->For(o.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      ForwardRow(o.dim(1), o.Row<float>(t), RowOrNull(weight, 0), RowOrNull(z, t), eps,
                 y.Row<float>(t), weight.empty() ? nullptr : rstd.Data<float>() + t);
    }
  });
}

void OutputGateBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& o,
                        const ConstTensor& weight, const ConstTensor& z, const ConstTensor& rstd,
                        const Tensor& dout, const Tensor& dz, const Tensor& dweight) {
  if (ctx.cuda()) {
    return Cuda(ctx).OutputGateBackward(ctx, dy, o, weight, z, rstd, dout, dz, dweight);
  }
  Check(ctx, o, weight, z, rstd);
  const int64_t width = o.dim(1);
  CheckShape(dy, {o.dim(0), width});
  CheckShape(dout, {o.dim(0), width});
  if (!z.empty()) CheckShape(dz, {o.dim(0), width});
  if (!dweight.empty()) {
    SALA_CHECK(!weight.empty()) << "dweight without a norm";
    CheckVector(dweight, width);
  }
  ForRowsWithSums(ctx, o.dim(0), width, dweight, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t t = begin; t < end; ++t) {
      const float r = weight.empty() ? 1.0F : rstd.Data<float>()[t];
      const float* dn = dy.Row<float>(t);
      if (!z.empty()) {
        GateBackwardRow(width, dn, o.Row<float>(t), RowOrNull(weight, 0), z.Row<float>(t), r,
                        dout.Row<float>(t), dz.Row<float>(t));
        dn = dout.Row<float>(t);
      }
      if (!weight.empty()) {
        NormBackwardRow(width, dn, o.Row<float>(t), weight.Data<float>(), r, dout.Row<float>(t),
                        sums);
      }
    }
  });
}

}  // namespace sala::kernels
