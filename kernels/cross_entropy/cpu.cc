#include <cmath>

#include "kernels/common/softmax_row.h"
#include "kernels/common/tensor_check.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/cuda_kernels.h"
#include "kernels/gemm/gemm.h"

namespace sala::kernels {
namespace {

constexpr int64_t kLogitRowGrain = 4;

struct RowResult {
  double loss = 0;
  bool correct = false;
};

// Log-sum-exp of one row of logits minus the label's logit. The logits become e^(x - max), their
// sum goes to *sum.
SALA_VECTORIZE RowResult LossRow(int64_t n, int64_t label, float* logits, double* sum) {
  const float largest = RowMax(n, logits);
  const bool correct = FirstIndexOf(n, logits, largest) == label;
  const double target = logits[label];
  *sum = ExpRow(n, largest, logits);
  return {std::log(*sum) + static_cast<double>(largest) - target, correct};
}

// e^(x - max) -> grad_scale (p - onehot(label))
SALA_VECTORIZE void GradientRow(int64_t n, int64_t label, double sum, float grad_scale,
                                float* logits) {
  const auto factor = static_cast<float>(static_cast<double>(grad_scale) / sum);
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) logits[i] *= factor;
  logits[label] -= grad_scale;
}

void Check(const Context& ctx, const ConstTensor& hidden, const ConstTensor& weight,
           const ConstTensor& labels, const CrossEntropyOptions& options, const Tensor& token_loss,
           const Tensor& dhidden, const Tensor& dweight) {
  CheckCpu(ctx);
  SALA_CHECK(hidden.rank() == 2 && weight.rank() == 2)
      << ShapeText(hidden) << ", " << ShapeText(weight);
  SALA_CHECK(options.chunk_tokens >= 1) << options.chunk_tokens;
  const int64_t tokens = hidden.dim(0);
  CheckShape(hidden, {tokens, weight.dim(1)});
  CheckShape(weight, {weight.dim(0), weight.dim(1)});
  CheckVector(labels, tokens, DType::kI32);
  if (!token_loss.empty()) CheckVector(token_loss, tokens);
  if (!dhidden.empty()) CheckShape(dhidden, {tokens, weight.dim(1)});
  if (!dweight.empty()) CheckShape(dweight, {weight.dim(0), weight.dim(1)});
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t label = labels.Data<int32_t>()[t];
    SALA_CHECK(label >= -1 && label < weight.dim(0))
        << "label " << label << " at " << t << ", vocabulary " << weight.dim(0);
  }
}

}  // namespace

CrossEntropyResult CrossEntropy(const Context& ctx, const ConstTensor& hidden,
                                const ConstTensor& weight, const ConstTensor& labels,
                                const CrossEntropyOptions& options, const Tensor& token_loss,
                                const Tensor& dhidden, const Tensor& dweight) {
  if (ctx.cuda()) {
    return Cuda(ctx).CrossEntropy(ctx, hidden, weight, labels, options, token_loss, dhidden,
                                  dweight);
  }
  Check(ctx, hidden, weight, labels, options, token_loss, dhidden, dweight);
  const int64_t tokens = hidden.dim(0);
  const int64_t vocabulary = weight.dim(0);
  const int64_t chunk = std::min(options.chunk_tokens, tokens);
  const bool gradient = !dhidden.empty() || !dweight.empty();
  const ArenaScope scope(*ctx.scratch);
  const Tensor buffer = ctx.scratch->New(DType::kF32, {chunk, vocabulary});
  auto* rows = static_cast<RowResult*>(
      ctx.scratch->Allocate(static_cast<size_t>(chunk) * sizeof(RowResult)));
  CrossEntropyResult result;
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t end = std::min(tokens, begin + chunk);
    const Tensor logits = buffer.Rows(0, end - begin);
    const auto* label = labels.Data<int32_t>() + begin;
    GemmNT(ctx, hidden.Rows(begin, end), weight, logits, {.alpha = options.logit_scale});
    ctx.pool->For(end - begin, kLogitRowGrain, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        float* row = logits.Row<float>(r);
        rows[r] = {};
        if (label[r] < 0) {
          if (gradient) std::fill_n(row, vocabulary, 0.0F);
          continue;
        }
        double sum = 0;
        rows[r] = LossRow(vocabulary, label[r], row, &sum);
        if (gradient) GradientRow(vocabulary, label[r], sum, options.grad_scale, row);
      }
    });
    for (int64_t r = 0; r < end - begin; ++r) {
      result.loss_sum += rows[r].loss;
      result.targets += label[r] >= 0 ? 1 : 0;
      result.correct += rows[r].correct ? 1 : 0;
      if (!token_loss.empty()) {
        token_loss.Data<float>()[begin + r] = static_cast<float>(rows[r].loss);
      }
    }
    if (!dhidden.empty()) {
      GemmNN(ctx, logits, weight, dhidden.Rows(begin, end), {.alpha = options.logit_scale});
    }
    if (!dweight.empty()) {
      GemmTN(ctx, logits, hidden.Rows(begin, end), dweight,
             {.alpha = options.logit_scale, .write = Write::kAccumulate});
    }
  }
  return result;
}

}  // namespace sala::kernels
