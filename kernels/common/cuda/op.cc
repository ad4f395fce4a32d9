// Part of the CUDA module.
#include <nvtx3/nvToolsExt.h>

#include "kernels/common/cuda.h"

namespace sala::kernels {

Op::Op(const Context& ctx, const char* name, const ConstTensor& subject)
    : device_(*static_cast<CudaDevice*>(ctx.gpu)), name_(name), subject_(subject) {
  SALA_CHECK(ctx.cuda() && ctx.gpu != nullptr && ctx.scratch != nullptr)
      << name << ": incomplete context";
  nvtxRangePushA(name);
}

Op::~Op() { nvtxRangePop(); }

void Op::Check(cudaError_t result) const {
  if (result == cudaSuccess) return;
  CheckCuda(result, name_, ShapeText(subject_), device_.options());
}

void Op::CheckTensor(const ConstTensor& x, DType dtype) const {
  if (x.empty()) return;
  SALA_CHECK(x.device() == DeviceKind::kCuda && x.dtype() == dtype)
      << name_ << ": found " << ShapeText(x)
      << (x.device() == DeviceKind::kCuda ? "" : " in host memory") << ", expected "
      << NameOf(dtype) << " on the device";
}

}  // namespace sala::kernels
