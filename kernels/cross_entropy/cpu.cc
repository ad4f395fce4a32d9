#include <optional>

#include "core/elementary.h"
#include "kernels/common/softmax_row.h"
#include "kernels/common/tensor_check.h"
#include "kernels/common/vectorized.h"
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
SALA_INLINE RowResult LossRowBody(int64_t n, int64_t label, float* logits, double* sum) {
  const float largest = RowMax(n, logits);
  const bool correct = FirstIndexOf(n, logits, largest) == label;
  const double target = logits[label];
  *sum = ExpRow(n, largest, logits);
  return {PortableLog(*sum) + static_cast<double>(largest) - target, correct};
}
constexpr Vectorized<LossRowBody> LossRow{};

// e^(x - max) -> grad_scale (p - onehot(label)), with factor = grad_scale / the sum; column -1: the
// label is not in this row.
SALA_INLINE void GradientRowBody(int64_t n, int64_t column, double factor, float grad_scale,
                                 float* logits) {
  const auto rounded = static_cast<float>(factor);
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) logits[i] *= rounded;
  if (column >= 0) logits[column] -= grad_scale;
}
constexpr Vectorized<GradientRowBody> GradientRow{};

// What this rank sends of a row: its share of the softmax, then the label's logit. The logits
// become e^(x - this rank's largest).
SALA_INLINE void SendRowBody(const ShardRows& shard, int64_t label, float* logits, float* message) {
  const int64_t n = shard.count;
  SoftmaxShare share;
  share.largest = RowMax(n, logits);
  const int64_t first = FirstIndexOf(n, logits, share.largest);
  if (first < n) share.id = static_cast<int32_t>(shard.first + first);
  const int64_t column = shard.ColumnOf(label);
  message[kSoftmaxFields] = column >= 0 ? logits[column] : 0.0F;
  share.sum = ExpRow(n, ShiftOf(share.largest), logits);
  PutShare(share, message);
}
constexpr Vectorized<SendRowBody> SendRow{};

// The loss of a row from the messages of all ranks, `distance` floats apart. *factor receives what
// e^(x - this rank's largest) is multiplied by in the gradient of 1 * loss.
RowResult ReceiveRow(const RankExchange& exchange, const float* messages, int64_t distance,
                     int64_t label, double* factor) {
  const SoftmaxShare row = JoinShares(messages, exchange.ranks, distance);
  double target = 0;
  for (int64_t k = 0; k < exchange.ranks; ++k) {
    target += static_cast<double>(messages[k * distance + kSoftmaxFields]);
  }
  const auto mine = static_cast<double>(messages[exchange.rank * distance + kLargestLogit]);
  *factor = PortableExp(mine - static_cast<double>(row.largest)) / row.sum;
  return {PortableLog(row.sum) + static_cast<double>(row.largest) - target, row.id == label};
}

void Check(const Context& ctx, const ConstTensor& hidden, const ConstTensor& weight,
           const ConstTensor& labels, const CrossEntropyOptions& options, const Tensor& token_loss,
           const Tensor& dhidden, const Tensor& dweight, int64_t vocabulary) {
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
    SALA_CHECK(label >= -1 && label < vocabulary)
        << "label " << label << " at " << t << ", vocabulary " << vocabulary;
  }
}

}  // namespace

CrossEntropyResult CrossEntropy(const Context& ctx, const ConstTensor& hidden,
                                const ConstTensor& all_weight, const ConstTensor& labels,
                                const CrossEntropyOptions& options, const Tensor& token_loss,
                                const Tensor& dhidden, const Tensor& all_dweight) {
  if (ctx.cuda()) {
    return Cuda(ctx).CrossEntropy(ctx, hidden, all_weight, labels, options, token_loss, dhidden,
                                  all_dweight);
  }
  const ShardRows shard = RowsOf(options.shard, all_weight.dim(0));
  Check(ctx, hidden, all_weight, labels, options, token_loss, dhidden, all_dweight,
        shard.vocabulary);
  const RankExchange* exchange = options.shard.exchange;
  const int64_t tokens = hidden.dim(0);
  // Padding takes part in nothing.
  const int64_t vocabulary = shard.count;
  const ConstTensor weight = all_weight.Rows(0, vocabulary);
  const Tensor dweight = all_dweight.empty() ? Tensor() : all_dweight.Rows(0, vocabulary);
  const int64_t chunk = std::min(options.chunk_tokens, tokens);
  const bool gradient = !dhidden.empty() || !dweight.empty();
  const ArenaScope scope(*ctx.scratch);
  const Tensor buffer = ctx.scratch->New(DType::kF32, {chunk, vocabulary});
  auto* rows = static_cast<RowResult*>(
      ctx.scratch->Allocate(static_cast<size_t>(chunk) * sizeof(RowResult)));
  std::optional<GatherBuffer> messages;
  if (exchange != nullptr) messages.emplace(ctx, *exchange, chunk * kCrossEntropyShardFloats);
  CrossEntropyResult result;
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t end = std::min(tokens, begin + chunk);
    const Tensor logits = buffer.Rows(0, end - begin);
    const auto* label = labels.Data<int32_t>() + begin;
    GemmNT(ctx, hidden.Rows(begin, end), weight, logits, {.alpha = options.logit_scale});
    if (exchange != nullptr) {
      auto* mine = messages->mine.Data<float>();
      ctx.pool->For(end - begin, kLogitRowGrain, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) {
          float* message = mine + r * kCrossEntropyShardFloats;
          if (label[r] < 0) {
            std::fill_n(message, kCrossEntropyShardFloats, 0.0F);
          } else {
            SendRow(shard, label[r], logits.Row<float>(r), message);
          }
        }
      });
      messages->Gather(ctx, *exchange, (end - begin) * kCrossEntropyShardFloats);
    }
    ctx.pool->For(end - begin, kLogitRowGrain, [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        float* row = logits.Row<float>(r);
        rows[r] = {};
        if (label[r] < 0) {
          if (gradient) std::fill_n(row, vocabulary, 0.0F);
          continue;
        }
        double factor = 0;
        if (exchange != nullptr) {
          rows[r] =
              ReceiveRow(*exchange, messages->all.Data<float>() + r * kCrossEntropyShardFloats,
                         (end - begin) * kCrossEntropyShardFloats, label[r], &factor);
          factor *= static_cast<double>(options.grad_scale);
        } else {
          double sum = 0;
          rows[r] = LossRow(vocabulary, label[r], row, &sum);
          factor = static_cast<double>(options.grad_scale) / sum;
        }
        if (gradient) {
          GradientRow(vocabulary, shard.ColumnOf(label[r]), factor, options.grad_scale, row);
        }
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
