#include "kernels/adamw/adamw.h"
#include "kernels/adamw/factors.h"
#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int64_t kElementGrain = 16384;

SALA_INLINE void UpdateBody(int64_t n, const AdamWFactors& given, const float* grad, float* param,
                            float* exp_avg, float* exp_avg_sq) {
  const AdamWFactors f = given;
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float g = f.grad_scale * grad[i];
    const float m = f.beta1 * exp_avg[i] + f.one_minus_beta1 * g;
    const float v = f.beta2 * exp_avg_sq[i] + f.one_minus_beta2 * (g * g);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    const float root = __builtin_sqrtf(v) * f.root_factor + f.eps;
    param[i] -= f.step_size * (m / root) + f.decay * param[i];
  }
}
constexpr Vectorized<UpdateBody> Update{};

}  // namespace

void AdamWStep(const Context& ctx, const Tensor& param, const ConstTensor& grad,
               const Tensor& exp_avg, const Tensor& exp_avg_sq, const AdamWOptions& options,
               const Tensor& rounded) {
  if (ctx.cuda())
    return Cuda(ctx).AdamWStep(ctx, param, grad, exp_avg, exp_avg_sq, options, rounded);
  CheckCpu(ctx);
  SALA_CHECK(rounded.empty()) << "on a CPU the model computes with the float32 parameters";
  SALA_CHECK(param.rank() == 1) << ShapeText(param);
  const int64_t n = param.dim(0);
  for (const ConstTensor& x :
       {ConstTensor(param), grad, ConstTensor(exp_avg), ConstTensor(exp_avg_sq)}) {
    CheckVector(x, n);
  }
  const AdamWFactors factors = FactorsOf(options);
  ctx.pool->For(n, kElementGrain, [&](int64_t begin, int64_t end) {
    Update(end - begin, factors, grad.Data<float>() + begin, param.Data<float>() + begin,
           exp_avg.Data<float>() + begin, exp_avg_sq.Data<float>() + begin);
  });
}

}  // namespace sala::kernels
