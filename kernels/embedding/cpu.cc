#include "kernels/common/tensor_check.h"
#include "kernels/common/vector_math.h"
#include "kernels/cuda_kernels.h"
#include "kernels/embedding/embedding.h"

namespace sala::kernels {
namespace {

// Columns of the gradient that one thread takes; every piece walks all tokens in order, so the cut
// changes no bits.
constexpr int64_t kColumnGrain = 64;

SALA_VECTORIZE void ScaleRow(int64_t n, const float* x, float scale, float* y) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = scale * x[i];
}

SALA_VECTORIZE void AddScaledRow(int64_t n, const float* x, float scale, float* y) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

void Check(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
           const ConstTensor& rows) {
  CheckCpu(ctx);
  SALA_CHECK(tokens.rank() == 1 && weight.rank() == 2)
      << ShapeText(tokens) << ", " << ShapeText(weight);
  CheckVector(tokens, tokens.dim(0), DType::kI32);
  CheckShape(weight, {weight.dim(0), weight.dim(1)});
  CheckShape(rows, {tokens.dim(0), weight.dim(1)});
  const auto* id = tokens.Data<int32_t>();
  for (int64_t t = 0; t < tokens.dim(0); ++t) {
    SALA_CHECK(id[t] >= 0 && id[t] < weight.dim(0))
        << "token " << id[t] << " at " << t << ", vocabulary " << weight.dim(0);
  }
}

}  // namespace

void EmbeddingForward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
                      float scale, const Tensor& out) {
  if (ctx.cuda()) return Cuda(ctx).EmbeddingForward(ctx, tokens, weight, scale, out);
  Check(ctx, tokens, weight, out);
  ctx.pool->For(tokens.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      ScaleRow(weight.dim(1), weight.Row<float>(tokens.Data<int32_t>()[t]), scale,
               out.Row<float>(t));
    }
  });
}

void EmbeddingBackward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& dout,
                       float scale, const Tensor& dweight) {
  if (ctx.cuda()) return Cuda(ctx).EmbeddingBackward(ctx, tokens, dout, scale, dweight);
  Check(ctx, tokens, dweight, dout);
  ctx.pool->For(dweight.dim(1), kColumnGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens.dim(0); ++t) {
      AddScaledRow(end - begin, dout.Row<float>(t) + begin, scale,
                   dweight.Row<float>(tokens.Data<int32_t>()[t]) + begin);
    }
  });
}

}  // namespace sala::kernels
