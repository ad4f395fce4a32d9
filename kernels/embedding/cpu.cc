#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
#include "kernels/cuda_kernels.h"
#include "kernels/embedding/embedding.h"

namespace sala::kernels {
namespace {

// Columns of the gradient that one thread takes; every piece walks all tokens in order, so the cut
// changes no bits.
constexpr int64_t kColumnGrain = 64;

SALA_INLINE void ScaleRowBody(int64_t n, const float* x, float scale, float* y) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] = scale * x[i];
}
constexpr Vectorized<ScaleRowBody> ScaleRow{};

SALA_INLINE void AddScaledRowBody(int64_t n, const float* x, float scale, float* y) {
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}
constexpr Vectorized<AddScaledRowBody> AddScaledRow{};

void Check(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
           const ConstTensor& rows, int64_t first_row) {
  CheckCpu(ctx);
  SALA_CHECK(tokens.rank() == 1 && weight.rank() == 2)
      << ShapeText(tokens) << ", " << ShapeText(weight);
  CheckVector(tokens, tokens.dim(0), DType::kI32);
  CheckShape(weight, {weight.dim(0), weight.dim(1)});
  CheckShape(rows, {tokens.dim(0), weight.dim(1)});
  SALA_CHECK(first_row >= kWholeTable) << "first row " << first_row;
  const auto* id = tokens.Data<int32_t>();
  for (int64_t t = 0; t < tokens.dim(0); ++t) {
    SALA_CHECK(id[t] >= 0 && (first_row != kWholeTable || id[t] < weight.dim(0)))
        << "token " << id[t] << " at " << t << ", vocabulary " << weight.dim(0);
  }
}

// The row of a token in this rank's part of the table; -1 where another rank has it.
int64_t RowOf(int32_t token, int64_t first_row, int64_t rows) {
  const int64_t row = token - std::max<int64_t>(first_row, 0);
  return row >= 0 && row < rows ? row : int64_t{-1};
}

}  // namespace

void EmbeddingForward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& weight,
                      float scale, const Tensor& out, int64_t first_row) {
  if (ctx.cuda()) return Cuda(ctx).EmbeddingForward(ctx, tokens, weight, scale, out, first_row);
  Check(ctx, tokens, weight, out, first_row);
  ctx.pool->For(tokens.dim(0), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = RowOf(tokens.Data<int32_t>()[t], first_row, weight.dim(0));
      if (row >= 0) {
        ScaleRow(weight.dim(1), weight.Row<float>(row), scale, out.Row<float>(t));
      } else {
        std::fill_n(out.Row<float>(t), weight.dim(1), 0.0F);
      }
    }
  });
}

void EmbeddingBackward(const Context& ctx, const ConstTensor& tokens, const ConstTensor& dout,
                       float scale, const Tensor& dweight, int64_t first_row) {
  if (ctx.cuda()) return Cuda(ctx).EmbeddingBackward(ctx, tokens, dout, scale, dweight, first_row);
  Check(ctx, tokens, dweight, dout, first_row);
  ctx.pool->For(dweight.dim(1), kColumnGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens.dim(0); ++t) {
      const int64_t row = RowOf(tokens.Data<int32_t>()[t], first_row, dweight.dim(0));
      if (row < 0) continue;
      AddScaledRow(end - begin, dout.Row<float>(t) + begin, scale, dweight.Row<float>(row) + begin);
    }
  });
}

}  // namespace sala::kernels
