#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"
#include "kernels/mse/mse.h"

namespace sala::kernels {
namespace {

struct Sums {
  double error = 0;
  double target = 0;
  double square = 0;
};

SALA_INLINE Sums SumRowBody(int64_t n, const float* y, const float* target) {
  Sums sums;
  sums.error = LaneSum<double>(n, [=](int64_t i) {
    const double difference = static_cast<double>(y[i]) - static_cast<double>(target[i]);
    return difference * difference;
  });
  sums.target = LaneSum<double>(n, [=](int64_t i) { return static_cast<double>(target[i]); });
  sums.square = LaneSum<double>(n, [=](int64_t i) {
    const double value = target[i];
    return value * value;
  });
  return sums;
}
constexpr Vectorized<SumRowBody> SumRow{};

SALA_INLINE void GradientRowBody(int64_t n, const float* y, const float* target, float factor,
                                 float* dy) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) dy[i] = factor * (y[i] - target[i]);
}
constexpr Vectorized<GradientRowBody> GradientRow{};

}  // namespace

MseResult MeanSquaredError(const Context& ctx, const ConstTensor& y, const ConstTensor& target,
                           float grad_scale, const Tensor& dy) {
  if (ctx.cuda()) return Cuda(ctx).MeanSquaredError(ctx, y, target, grad_scale, dy);
  CheckCpu(ctx);
  SALA_CHECK(y.rank() == 2) << ShapeText(y);
  const int64_t tokens = y.dim(0);
  const int64_t width = y.dim(1);
  CheckShape(y, {tokens, width});
  CheckShape(target, {tokens, width});
  if (!dy.empty()) CheckShape(dy, {tokens, width});
  const ArenaScope scope(*ctx.scratch);
  auto* rows =
      static_cast<Sums*>(ctx.scratch->Allocate(static_cast<size_t>(tokens) * sizeof(Sums)));
  ctx.pool->For(tokens, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      rows[t] = SumRow(width, y.Row<float>(t), target.Row<float>(t));
      if (!dy.empty()) {
        GradientRow(width, y.Row<float>(t), target.Row<float>(t), 2.0F * grad_scale,
                    dy.Row<float>(t));
      }
    }
  });
  MseResult result;
  result.elements = tokens * width;
  for (int64_t t = 0; t < tokens; ++t) {
    result.squared_error += rows[t].error;
    result.target_sum += rows[t].target;
    result.target_square += rows[t].square;
  }
  return result;
}

}  // namespace sala::kernels
