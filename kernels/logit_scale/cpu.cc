
#include "core/check.h"
#include "core/elementary.h"
#include "kernels/logit_scale/logit_scale.h"

namespace sala::kernels {

void LogitScaleForward(const Context& ctx, const ConstTensor& positions, double a,
                       const Tensor& q) {
  SALA_CHECK(!ctx.cuda()) << "the logit scale is part of inference, which runs on the CPU only";
  SALA_CHECK(a > 1 && q.rank() == 3 && positions.dim(0) == q.dim(0))
      << "a " << a << ", q " << ShapeText(q);
  const auto* position = positions.Data<int32_t>();
  ctx.pool->For(q.dim(0), 256, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto scale = static_cast<float>(PortableLog(position[t] + a) / PortableLog(a));
      for (int64_t n = 0; n < q.dim(1); ++n) {
        float* row = q.Row<float>(t) + n * q.stride(1);
        for (int64_t d = 0; d < q.dim(2); ++d) row[d] *= scale;
      }
    }
  });
}

}  // namespace sala::kernels
