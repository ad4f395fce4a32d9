// Cross entropy on the GPU: chunks of tokens through three matrix products and one kernel over rows
// of logits.
//
// The logits of a chunk are float32: 4 bytes each. With bfloat16 logits the chunk would take half,
// but a logit of 16 would be off by up to 1/16: the loss of a token by as much, and the two best
// candidates would often tie, so that "correct" would count ties. The gradient is an operand of two
// products on tensor cores and must be bfloat16; it is written over its own row of logits, in the
// first half of the row's bytes, so that a chunk needs no second buffer. Products take its rows at
// twice the distance.
//
// The row kernel is bound by memory: it reads a row twice (maximum and sum in one pass, then the
// gradient) and writes half of its bytes. That is 10 bytes a logit beside the 4 that the first
// product writes and the 4 that the other two read: for the released model's 73448 entries about
// 1.3 MB a token, below 1% of a training step's time.
//
// Where the rows of the weight are cut over ranks the row kernel is cut in two, with the exchange
// of a few numbers a token between its passes.
#include <optional>

#include "kernels/common/cuda_softmax_row.h"
#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

// Per-token numbers that are summed at the end.
enum Field : int { kLoss, kTarget, kCorrect, kBadLabel, kFields };

struct Chunk {
  float* logits;  // becomes the gradient, as bfloat16
  int64_t stride;
  int vocabulary;
  const int32_t* labels;
  float* token_loss;  // may be null
  double* fields;     // the chunk's first token in field 0
  int64_t tokens;     // of all chunks: distance of fields
  float slope;        // grad_scale * logit_scale
  bool gradient;
};

// One thread of the block.
__device__ __forceinline__ void PutFields(const Chunk& chunk, int64_t r, double loss, int32_t label,
                                          int vocabulary, bool correct) {
  double* fields = chunk.fields + r;
  fields[kLoss * chunk.tokens] = loss;
  fields[kTarget * chunk.tokens] = label >= 0 && label < vocabulary ? 1.0 : 0.0;
  fields[kCorrect * chunk.tokens] = correct ? 1.0 : 0.0;
  fields[kBadLabel * chunk.tokens] = label < -1 || label >= vocabulary ? 1.0 : 0.0;
  if (chunk.token_loss != nullptr) chunk.token_loss[r] = static_cast<float>(loss);
}

// What the thread's columns of a row come to.
__device__ __forceinline__ OnlineSoftmax ReadRow(const float* row, int n) {
  OnlineSoftmax mine;
  float x[8];
  for (int column = static_cast<int>(threadIdx.x) * 8; column < n; column += kRowStep) {
    LoadLogits8(row, column, n, x);
    mine.Add8(x, column);
  }
  return mine;
}

// A row's gradient where there is no target.
__device__ __forceinline__ void WriteZeros(const Chunk& chunk, float* row) {
  auto* gradient = reinterpret_cast<Bf16*>(row);
  const float zero[8] = {};
  for (int column = static_cast<int>(threadIdx.x) * 8; column < chunk.vocabulary;
       column += kRowStep) {
    Store8(gradient + column, zero);
  }
}

// slope (p - onehot) over the row's logits; label_column -1: the label is not in this row.
__device__ __forceinline__ void WriteGradient(const Chunk& chunk, float* row, const RowSoftmax& all,
                                              int label_column) {
  const int n = chunk.vocabulary;
  auto* gradient = reinterpret_cast<Bf16*>(row);
  const auto factor = static_cast<float>(double{chunk.slope} / all.sum);
  const float largest = all.largest;
  float x[8];
  for (int begin = 0; begin < n; begin += kRowStep) {
    const int column = begin + static_cast<int>(threadIdx.x) * 8;
    if (column < n) LoadLogits8(row, column, n, x);
    // Bytes [2 begin, 2 begin + 2 kRowStep) are written now: of logits that have been read, here or
    // in the steps before.
    __syncthreads();
    if (column >= n) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      x[j] = factor * __expf(x[j] - largest);
      if (column + j == label_column) x[j] -= chunk.slope;
    }
    Store8(gradient + column, x);
  }
}

// One block a token.
__global__ void __launch_bounds__(kLogitThreads) CrossEntropyRowKernel(Chunk chunk) {
  SharedMemory shared;
  const RowSlots slots = TakeRowSlots(shared);
  const int64_t r = blockIdx.x;
  const int n = chunk.vocabulary;
  float* row = chunk.logits + r * chunk.stride;
  const int32_t label = chunk.labels[r];
  if (label < 0 || label >= n) {  // the whole block
    if (threadIdx.x == 0) PutFields(chunk, r, 0.0, label, n, false);
    if (chunk.gradient) WriteZeros(chunk, row);
    return;
  }
  // Before the first barrier: the gradient will stand in its place.
  const float label_logit = row[label];
  const RowSoftmax all = CombineRow(ReadRow(row, n), slots);
  if (threadIdx.x == 0) {
    PutFields(chunk, r, log(all.sum) + (double{all.largest} - double{label_logit}), label, n,
              all.column == label);
  }
  if (chunk.gradient) WriteGradient(chunk, row, all, label);
}

// How the vocabulary of a chunk's rows is cut.
struct Shard {
  int64_t first_row;
  int vocabulary;  // of all ranks
  int ranks;
  float* mine;       // [tokens of the chunk, kCrossEntropyShardFloats]
  const float* all;  // [ranks, ...]
};

// What this rank sends of a row: its share of the softmax, then the label's logit. Zeros where
// there is no target.
__global__ void __launch_bounds__(kLogitThreads) CrossEntropySendKernel(Chunk chunk, Shard shard) {
  SharedMemory shared;
  const RowSlots slots = TakeRowSlots(shared);
  const int64_t r = blockIdx.x;
  const float* row = chunk.logits + r * chunk.stride;
  float* message = shard.mine + r * kCrossEntropyShardFloats;
  const int32_t label = chunk.labels[r];
  if (label < 0 || label >= shard.vocabulary) {  // the whole block
    if (threadIdx.x < kCrossEntropyShardFloats) message[threadIdx.x] = 0.0F;
    return;
  }
  const RowSoftmax part = CombinePart(ReadRow(row, chunk.vocabulary), slots);
  if (threadIdx.x == 0) {
    PutShare(part, shard.first_row, message);
    const int64_t column = label - shard.first_row;
    message[kSoftmaxFields] = column >= 0 && column < chunk.vocabulary ? row[column] : 0.0F;
  }
}

// Loss and gradient of a row from the messages of all ranks.
__global__ void __launch_bounds__(kLogitThreads)
    CrossEntropyReceiveKernel(Chunk chunk, Shard shard) {
  SharedMemory shared;
  RowSoftmax* joined = shared.Take<RowSoftmax>(1);
  const int64_t r = blockIdx.x;
  float* row = chunk.logits + r * chunk.stride;
  const int32_t label = chunk.labels[r];
  if (label < 0 || label >= shard.vocabulary) {  // the whole block
    if (threadIdx.x == 0) PutFields(chunk, r, 0.0, label, shard.vocabulary, false);
    if (chunk.gradient) WriteZeros(chunk, row);
    return;
  }
  if (threadIdx.x == 0) {
    const int64_t distance = gridDim.x * kCrossEntropyShardFloats;
    const float* messages = shard.all + r * kCrossEntropyShardFloats;
    const RowSoftmax all = JoinRow(messages, shard.ranks, distance);
    double target = 0.0;
    for (int k = 0; k < shard.ranks; ++k) target += messages[k * distance + kSoftmaxFields];
    PutFields(chunk, r, log(all.sum) + (double{all.largest} - target), label, shard.vocabulary,
              all.column == label);
    *joined = all;
  }
  __syncthreads();
  if (!chunk.gradient) return;
  const int64_t column = label - shard.first_row;
  const bool mine = column >= 0 && column < chunk.vocabulary;
  WriteGradient(chunk, row, *joined, mine ? static_cast<int>(column) : -1);
}

void Check(const ConstTensor& hidden, const ConstTensor& weight, const ConstTensor& labels,
           const CrossEntropyOptions& options, const Tensor& token_loss, const Tensor& dhidden,
           const Tensor& dweight, int64_t vocabulary) {
  SALA_CHECK(hidden.rank() == 2 && weight.rank() == 2)
      << ShapeText(hidden) << ", " << ShapeText(weight);
  SALA_CHECK(options.chunk_tokens >= 1) << options.chunk_tokens;
  const int64_t tokens = hidden.dim(0);
  const int64_t rows = weight.dim(0);
  const int64_t width = weight.dim(1);
  SALA_CHECK(vocabulary >= 1 && vocabulary <= int64_t{1} << 30)
      << "vocabulary " << vocabulary << ": a GPU takes 1 to 2^30";
  SALA_CHECK(width % 8 == 0) << "width " << width << ": a GPU takes multiples of 8";
  CheckShape(hidden, {tokens, width}, DType::kBF16);
  CheckShape(weight, {rows, width}, DType::kBF16);
  CheckVector(labels, tokens, DType::kI32);
  if (!token_loss.empty()) CheckVector(token_loss, tokens);
  if (!dhidden.empty()) CheckShape(dhidden, {tokens, width}, DType::kBF16);
  if (!dweight.empty()) CheckShape(dweight, {rows, width});
}

}  // namespace

CrossEntropyResult cuda::CrossEntropy(const Context& ctx, const ConstTensor& hidden,
                                      const ConstTensor& all_weight, const ConstTensor& labels,
                                      const CrossEntropyOptions& options, const Tensor& token_loss,
                                      const Tensor& dhidden, const Tensor& all_dweight) {
  const Op op(ctx, "CrossEntropy", all_weight);
  const ShardRows rows = RowsOf(options.shard, all_weight.dim(0));
  Check(hidden, all_weight, labels, options, token_loss, dhidden, all_dweight, rows.vocabulary);
  const RankExchange* exchange = options.shard.exchange;
  const int64_t tokens = hidden.dim(0);
  // Padding takes part in nothing.
  const int64_t vocabulary = rows.count;
  const ConstTensor weight = all_weight.Rows(0, vocabulary);
  const Tensor dweight = all_dweight.empty() ? Tensor() : all_dweight.Rows(0, vocabulary);
  if (tokens == 0) return {};
  const int64_t chunk_tokens = std::min(options.chunk_tokens, tokens);
  const int64_t stride = LogitStride(vocabulary);
  const ArenaScope scope(*ctx.scratch);
  const Tensor buffer = ctx.scratch->New(DType::kF32, {chunk_tokens, stride});
  auto* fields = static_cast<double*>(
      ctx.scratch->Allocate(static_cast<size_t>(kFields * tokens) * sizeof(double)));
  auto* sums = static_cast<double*>(ctx.scratch->Allocate(kFields * sizeof(double)));
  const Tensor gradients =
      Tensor(buffer.raw(), DType::kBF16, {chunk_tokens, 2 * stride}, DeviceKind::kCuda)
          .Columns(0, vocabulary);
  Chunk chunk = {.logits = op.Data<float>(buffer),
                 .stride = stride,
                 .vocabulary = static_cast<int>(vocabulary),
                 .labels = op.Data<int32_t>(labels),
                 .token_loss = op.Data<float>(token_loss),
                 .fields = fields,
                 .tokens = tokens,
                 .slope = options.grad_scale * options.logit_scale,
                 .gradient = !dhidden.empty() || !dweight.empty()};
  std::optional<GatherBuffer> messages;
  Shard shard = {};
  if (exchange != nullptr) {
    messages.emplace(ctx, *exchange, chunk_tokens * kCrossEntropyShardFloats);
    shard = {.first_row = rows.first,
             .vocabulary = static_cast<int>(rows.vocabulary),
             .ranks = static_cast<int>(exchange->ranks),
             .mine = op.Data<float>(messages->mine),
             .all = op.Data<float>(messages->all)};
  }
  for (int64_t begin = 0; begin < tokens; begin += chunk_tokens) {
    const int64_t end = std::min(tokens, begin + chunk_tokens);
    const int64_t count = end - begin;
    const Tensor logits = buffer.Rows(0, count).Columns(0, vocabulary);
    cuda::GemmNT(ctx, hidden.Rows(begin, end), weight, logits, {.alpha = options.logit_scale});
    const dim3 grid(static_cast<unsigned>(count));
    if (exchange == nullptr) {
      op.Launch(CrossEntropyRowKernel, grid, dim3(kLogitThreads), kRowSlotBytes, chunk);
    } else {
      op.Launch(CrossEntropySendKernel, grid, dim3(kLogitThreads), kRowSlotBytes, chunk, shard);
      messages->Gather(ctx, *exchange, count * kCrossEntropyShardFloats);
      op.Launch(CrossEntropyReceiveKernel, grid, dim3(kLogitThreads), SharedBytes<RowSoftmax>(1),
                chunk, shard);
    }
    chunk.labels += count;
    chunk.fields += count;
    if (chunk.token_loss != nullptr) chunk.token_loss += count;
    const Tensor gradient = gradients.Rows(0, count);
    if (!dhidden.empty()) cuda::GemmNN(ctx, gradient, weight, dhidden.Rows(begin, end), {});
    if (!dweight.empty()) {
      cuda::GemmTN(ctx, gradient, hidden.Rows(begin, end), dweight, {.write = Write::kAccumulate});
    }
  }
  SumTokens(op, fields, kFields, tokens, sums);
  double found[kFields];
  ctx.gpu->Download(found, sums, sizeof(found));  // the one wait
  SALA_CHECK(found[kBadLabel] == 0)
      << found[kBadLabel] << " labels outside of [-1, " << rows.vocabulary << ")";
  CrossEntropyResult result;
  result.loss_sum = found[kLoss];
  result.targets = static_cast<int64_t>(found[kTarget]);
  result.correct = static_cast<int64_t>(found[kCorrect]);
  return result;
}

}  // namespace sala::kernels
