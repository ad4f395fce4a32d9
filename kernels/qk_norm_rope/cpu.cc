#include <cmath>
#include <vector>

#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"
#include "kernels/qk_norm_rope/frequencies.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/row.h"

namespace sala::kernels {
namespace {

constexpr int64_t kMaxHeadDim = 1024;  // bound of a head's copy on the stack

// In the head functions a null weight means no norm, a null cos no rotation.

SALA_VECTORIZE void ForwardHead(int64_t half, const float* x, const float* weight, float eps,
                                const float* cos, const float* sin, float* y, float* rstd) {
  const int64_t d = 2 * half;
  float normed[kMaxHeadDim];
  const float* from = x;
  if (weight != nullptr) {
    const float r = RowRstd(d, x, eps);
    *rstd = r;
    for (int64_t i = 0; i < d; ++i) normed[i] = x[i] * r * weight[i];
    from = normed;
  }
  if (cos == nullptr) {
    for (int64_t i = 0; i < d; ++i) y[i] = from[i];
    return;
  }
  SALA_INDEPENDENT
  for (int64_t i = 0; i < half; ++i) {
    y[i] = from[i] * cos[i] - from[i + half] * sin[i];
    y[i + half] = from[i + half] * cos[i] + from[i] * sin[i];
  }
}

SALA_VECTORIZE void BackwardHead(int64_t half, const float* dy, const float* x, const float* weight,
                                 float rstd, const float* cos, const float* sin, float* dx,
                                 float* weight_sums) {
  const int64_t d = 2 * half;
  float rotated[kMaxHeadDim];
  const float* dn = dy;
  if (cos != nullptr) {
    // The rotation is orthogonal: its transpose turns back.
    for (int64_t i = 0; i < half; ++i) {
      rotated[i] = dy[i] * cos[i] + dy[i + half] * sin[i];
      rotated[i + half] = dy[i + half] * cos[i] - dy[i] * sin[i];
    }
    dn = rotated;
  }
  if (weight != nullptr) {
    RowNormBackward<false>(d, dn, x, weight, rstd, dx, weight_sums);
  } else {
    for (int64_t i = 0; i < d; ++i) dx[i] = dn[i];
  }
}

void Check(const Context& ctx, const ConstTensor& x, const ConstTensor& weight,
           const ConstTensor& rstd, const ConstTensor& cos, const ConstTensor& sin) {
  CheckCpu(ctx);
  SALA_CHECK(x.rank() == 3) << ShapeText(x);
  const int64_t tokens = x.dim(0);
  const int64_t d = x.dim(2);
  CheckShape(x, {tokens, x.dim(1), d});
  SALA_CHECK(d <= kMaxHeadDim && d % 2 == 0) << "head dimension " << d;
  if (!weight.empty()) {
    CheckVector(weight, d);
    CheckShape(rstd, {tokens, x.dim(1)});
  }
  SALA_CHECK(cos.empty() == sin.empty()) << "cos and sin go together";
  if (!cos.empty()) {
    CheckShape(cos, {tokens, d / 2});
    CheckShape(sin, {tokens, d / 2});
  }
}

template <typename TensorType>
auto RowOrNull(const TensorType& x, int64_t t) {
  return x.empty() ? nullptr : x.template Row<float>(t);
}

}  // namespace

void RopeTable(const Context& ctx, const ConstTensor& positions, int64_t head_dim, float theta,
               const Tensor& cos, const Tensor& sin) {
  if (ctx.cuda()) return Cuda(ctx).RopeTable(ctx, positions, head_dim, theta, cos, sin);
  CheckCpu(ctx);
  SALA_CHECK(positions.rank() == 1 && head_dim % 2 == 0) << "head dimension " << head_dim;
  const int64_t tokens = positions.dim(0);
  const int64_t half = head_dim / 2;
  CheckVector(positions, tokens, DType::kI32);
  CheckShape(cos, {tokens, half});
  CheckShape(sin, {tokens, half});
  const std::vector<float> frequency = RopeFrequencies(head_dim, theta);
  ctx.pool->For(tokens, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t position = positions.Data<int32_t>()[t];
      for (int64_t i = 0; i < half; ++i) {
        const float angle = RopeAngle(position, frequency[static_cast<size_t>(i)]);
        cos.Row<float>(t)[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
        sin.Row<float>(t)[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  });
}

void QkNormRopeForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight,
                       float eps, const ConstTensor& cos, const ConstTensor& sin, const Tensor& y,
                       const Tensor& rstd) {
  if (ctx.cuda()) return Cuda(ctx).QkNormRopeForward(ctx, x, weight, eps, cos, sin, y, rstd);
  Check(ctx, x, weight, rstd, cos, sin);
  CheckShape(y, {x.dim(0), x.dim(1), x.dim(2)});
  ctx.pool->For(x.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < x.dim(1); ++h) {
        ForwardHead(x.dim(2) / 2, x.Row<float>(t) + h * x.stride(1), RowOrNull(weight, 0), eps,
                    RowOrNull(cos, t), RowOrNull(sin, t), y.Row<float>(t) + h * y.stride(1),
                    weight.empty() ? nullptr : rstd.Row<float>(t) + h);
      }
    }
  });
}

void QkNormRopeBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                        const ConstTensor& weight, const ConstTensor& rstd, const ConstTensor& cos,
                        const ConstTensor& sin, const Tensor& dx, const Tensor& dweight) {
  if (ctx.cuda()) {
    return Cuda(ctx).QkNormRopeBackward(ctx, dy, x, weight, rstd, cos, sin, dx, dweight);
  }
  Check(ctx, x, weight, rstd, cos, sin);
  CheckShape(dy, {x.dim(0), x.dim(1), x.dim(2)});
  CheckShape(dx, {x.dim(0), x.dim(1), x.dim(2)});
  if (!dweight.empty()) {
    SALA_CHECK(!weight.empty()) << "dweight without a norm";
    CheckVector(dweight, x.dim(2));
  }
  ForRowsWithSums(ctx, x.dim(0), x.dim(2), dweight, [&](int64_t begin, int64_t end, float* sums) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t h = 0; h < x.dim(1); ++h) {
        BackwardHead(x.dim(2) / 2, dy.Row<float>(t) + h * dy.stride(1),
                     x.Row<float>(t) + h * x.stride(1), RowOrNull(weight, 0),
                     weight.empty() ? 1.0F : rstd.Row<float>(t)[h], RowOrNull(cos, t),
                     RowOrNull(sin, t), dx.Row<float>(t) + h * dx.stride(1), sums);
      }
    }
  });
}

}  // namespace sala::kernels
