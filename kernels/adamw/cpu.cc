#include <cmath>

#include "kernels/adamw/adamw.h"
#include "kernels/common/tensor_check.h"
#include "kernels/common/vector_math.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int64_t kElementGrain = 16384;

// The step's scalars, worked out in double. With c1 = 1 - b1^step and c2 = 1 - b2^step:
//   p -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps) + lr wd p
struct Factors {
  float grad_scale;
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;    // lr / c1
  float root_factor;  // 1 / sqrt(c2)
  float eps;
  float decay;  // lr wd
};

SALA_VECTORIZE void Update(int64_t n, const Factors& given, const float* grad, float* param,
                           float* exp_avg, float* exp_avg_sq) {
  const Factors f = given;
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
  SALA_CHECK(options.step >= 1) << "step " << options.step;
  const auto step = static_cast<double>(options.step);
  const double c1 = 1 - std::pow(options.beta1, step);
  const double c2 = 1 - std::pow(options.beta2, step);
  const Factors factors = {static_cast<float>(options.grad_scale),
                           static_cast<float>(options.beta1),
                           static_cast<float>(1 - options.beta1),
                           static_cast<float>(options.beta2),
                           static_cast<float>(1 - options.beta2),
                           static_cast<float>(options.learning_rate / c1),
                           static_cast<float>(1 / std::sqrt(c2)),
                           static_cast<float>(options.eps),
                           static_cast<float>(options.learning_rate * options.weight_decay)};
  ctx.pool->For(n, kElementGrain, [&](int64_t begin, int64_t end) {
    Update(end - begin, factors, grad.Data<float>() + begin, param.Data<float>() + begin,
           exp_avg.Data<float>() + begin, exp_avg_sq.Data<float>() + begin);
  });
}

}  // namespace sala::kernels
