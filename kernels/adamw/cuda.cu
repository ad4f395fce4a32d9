// AdamW on the GPU: bound by memory, one pass over all buffers, four elements a thread and step
// where the addresses allow 16-byte accesses, one where not (a part of a flat buffer may begin
// anywhere). Every operation is rounded by itself, none fused, in the order of the CPU form: the
// same numbers give the same bits.
#include "kernels/adamw/factors.h"
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

struct Buffers {
  const float* grad;
  float* param;
  float* exp_avg;
  float* exp_avg_sq;
  Bf16* rounded;  // may be null
};

__device__ __forceinline__ void Update(const AdamWFactors& f, float grad, float& param, float& m,
                                       float& v) {
  const float g = __fmul_rn(f.grad_scale, grad);
  m = __fadd_rn(__fmul_rn(f.beta1, m), __fmul_rn(f.one_minus_beta1, g));
  v = __fadd_rn(__fmul_rn(f.beta2, v), __fmul_rn(f.one_minus_beta2, __fmul_rn(g, g)));
  const float root = __fadd_rn(__fmul_rn(__fsqrt_rn(v), f.root_factor), f.eps);
  const float step = __fmul_rn(f.step_size, __fdiv_rn(m, root));
  param = __fsub_rn(param, __fadd_rn(step, __fmul_rn(f.decay, param)));
}

// The first `packs` times four elements go by packs, the rest one by one.
__global__ void __launch_bounds__(kPackThreads)
    StepKernel(Buffers b, AdamWFactors factors, int64_t packs, int64_t count) {
  const int64_t first = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kPackThreads;
  for (int64_t i = first; i < packs; i += step) {
    const float4 grad = reinterpret_cast<const float4*>(b.grad)[i];
    float4 param = reinterpret_cast<float4*>(b.param)[i];
    float4 m = reinterpret_cast<float4*>(b.exp_avg)[i];
    float4 v = reinterpret_cast<float4*>(b.exp_avg_sq)[i];
    Update(factors, grad.x, param.x, m.x, v.x);
    Update(factors, grad.y, param.y, m.y, v.y);
    Update(factors, grad.z, param.z, m.z, v.z);
    Update(factors, grad.w, param.w, m.w, v.w);
    reinterpret_cast<float4*>(b.param)[i] = param;
    reinterpret_cast<float4*>(b.exp_avg)[i] = m;
    reinterpret_cast<float4*>(b.exp_avg_sq)[i] = v;
    if (b.rounded != nullptr) {
      reinterpret_cast<uint2*>(b.rounded)[i] =
          make_uint2(PackBf16(param.x, param.y), PackBf16(param.z, param.w));
    }
  }
  for (int64_t i = 4 * packs + first; i < count; i += step) {
    float param = b.param[i];
    float m = b.exp_avg[i];
    float v = b.exp_avg_sq[i];
    Update(factors, b.grad[i], param, m, v);
    b.param[i] = param;
    b.exp_avg[i] = m;
    b.exp_avg_sq[i] = v;
    if (b.rounded != nullptr) b.rounded[i] = __float2bfloat16(param);
  }
}

}  // namespace

void cuda::AdamWStep(const Context& ctx, const Tensor& param, const ConstTensor& grad,
                     const Tensor& exp_avg, const Tensor& exp_avg_sq, const AdamWOptions& options,
                     const Tensor& rounded) {
  const Op op(ctx, "AdamWStep", param);
  SALA_CHECK(param.rank() == 1) << ShapeText(param);
  const int64_t n = param.dim(0);
  bool aligned = reinterpret_cast<uintptr_t>(rounded.raw()) % 8 == 0;
  for (const ConstTensor& x :
       {ConstTensor(param), grad, ConstTensor(exp_avg), ConstTensor(exp_avg_sq)}) {
    CheckVector(x, n);
    aligned = aligned && Aligned16(x.raw());
  }
  if (!rounded.empty()) CheckVector(rounded, n, DType::kBF16);
  const int64_t packs = aligned ? n / 4 : 0;
  const Buffers buffers = {.grad = op.Data<float>(grad),
                           .param = op.Data<float>(param),
                           .exp_avg = op.Data<float>(exp_avg),
                           .exp_avg_sq = op.Data<float>(exp_avg_sq),
                           .rounded = op.Data<Bf16>(rounded)};
  op.Launch(StepKernel, dim3(PackBlocks(op, std::max(packs, n - 4 * packs))), dim3(kPackThreads), 0,
            buffers, FactorsOf(options), packs, n);
}

}  // namespace sala::kernels
