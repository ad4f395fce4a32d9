// KL divergence of two output heads on the GPU: chunks of tokens through up to four matrix products
// and one kernel over pairs of rows of logits.
//
// Both heads' logits of a chunk are float32, for the reasons given in kernels/cross_entropy/cuda.cu
// and one more: the divergence of a student close to its teacher is of second order in the
// difference of their logits, and would drown in bfloat16 rounding of them. The student's gradient
// is written as bfloat16 over its own row of logits.
//
// The row kernel is bound by memory: two rows are read twice (maxima and sums, then divergence,
// entropy and gradient) and a quarter of them written.
//
// Where the rows of the weights are cut over ranks the row kernel is cut in two and a small third
// one follows, with the exchange of a few numbers a token between them.
#include <optional>

#include "kernels/common/cuda_softmax_row.h"
#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

// Per-token numbers that are summed at the end.
enum Field : int { kDivergence, kEntropy, kAgree, kFields };

struct Chunk {
  const float* teacher;  // logits / tau
  float* student;        // logits / tau; becomes the gradient, as bfloat16
  int64_t stride;
  int vocabulary;
  double* fields;  // the chunk's first token in field 0
  int64_t tokens;  // of all chunks: distance of fields
  double slope;    // tau * grad_scale * student_logit_scale
  bool gradient;
};

// With a = teacher - its largest, b = student - its largest, A = sum e^a, B = sum e^b, p = e^a / A
// and q = e^b / B:
//   KL = (sum e^a (a - b)) / A - log A + log B      entropy = log A - (sum e^a a) / A
//   gradient = slope (q - p)
// Equal rows give 0 exactly in all of them but the entropy: the same bits on both sides.

// What the thread's columns of both rows come to.
__device__ __forceinline__ void ReadRows(const float* teacher, const float* student, int n,
                                         OnlineSoftmax& my_teacher, OnlineSoftmax& my_student) {
  float x[8], y[8];
  for (int column = static_cast<int>(threadIdx.x) * 8; column < n; column += kRowStep) {
    LoadLogits8(teacher, column, n, x);
    LoadLogits8(student, column, n, y);
    my_teacher.Add8(x, column);
    my_student.Add8(y, column);
  }
}

struct RowSums {
  double difference;  // sum of e^a (a - b)
  double energy;      // sum of e^a a
};

// The sums over this row's columns, on every thread; the student's row becomes the gradient. The
// whole block.
__device__ __forceinline__ RowSums DivergenceRow(const Chunk& chunk, const float* teacher,
                                                 float* student, const RowSoftmax& p,
                                                 const RowSoftmax& q, double* slots) {
  const int n = chunk.vocabulary;
  auto* gradient = reinterpret_cast<Bf16*>(student);
  float x[8], y[8];
  const auto p_factor = static_cast<float>(chunk.slope / p.sum);
  const auto q_factor = static_cast<float>(chunk.slope / q.sum);
  float difference = 0.0F;
  float energy = 0.0F;
  for (int begin = 0; begin < n; begin += kRowStep) {
    const int column = begin + static_cast<int>(threadIdx.x) * 8;
    if (column < n) {
      LoadLogits8(teacher, column, n, x);
      LoadLogits8(student, column, n, y);
    }
    // Bytes [2 begin, 2 begin + 2 kRowStep) are written now: of logits that have been read, here or
    // in the steps before.
    __syncthreads();
    if (column >= n) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float a = x[j] - p.largest;
      const float b = y[j] - q.largest;
      const float e = __expf(a);
      if (column + j < n) {  // not infinity less infinity
        difference += e * (a - b);
        energy += e * a;
      }
      // Products rounded before they are subtracted, or equal rows would give a rest.
      y[j] = __fmul_rn(__expf(b), q_factor) - __fmul_rn(e, p_factor);
    }
    if (chunk.gradient) Store8(gradient + column, y);
  }
  const double all_difference = BlockSum(double{difference}, slots);
  const double all_energy = BlockSum(double{energy}, slots);
  return {all_difference, all_energy};
}

// One thread of a row.
__device__ __forceinline__ void PutFields(const Chunk& chunk, int64_t r, const RowSums& sums,
                                          const RowSoftmax& p, const RowSoftmax& q) {
  double* fields = chunk.fields + r;
  const double log_p = log(p.sum);
  fields[kDivergence * chunk.tokens] = sums.difference / p.sum - log_p + log(q.sum);
  fields[kEntropy * chunk.tokens] = log_p - sums.energy / p.sum;
  fields[kAgree * chunk.tokens] = p.column == q.column ? 1.0 : 0.0;
}

// One block a token.
__global__ void __launch_bounds__(kLogitThreads) KlDivergenceRowKernel(Chunk chunk) {
  SharedMemory shared;
  const RowSlots slots = TakeRowSlots(shared);
  const int64_t r = blockIdx.x;
  const float* teacher = chunk.teacher + r * chunk.stride;
  float* student = chunk.student + r * chunk.stride;
  OnlineSoftmax my_teacher, my_student;
  ReadRows(teacher, student, chunk.vocabulary, my_teacher, my_student);
  const RowSoftmax p = CombineRow(my_teacher, slots);
  const RowSoftmax q = CombineRow(my_student, slots);
  const RowSums sums = DivergenceRow(chunk, teacher, student, p, q, slots.sums);
  if (threadIdx.x == 0) PutFields(chunk, r, sums, p, q);
}

// How the vocabulary of a chunk's rows is cut, and what the ranks have sent.
struct Shard {
  int64_t first_row;
  int ranks;
  float* my_shares;        // [tokens of the chunk, kKlSoftmaxFloats]
  const float* shares;     // [ranks, ...]
  float* my_parts;         // [tokens of the chunk, kKlPartFloats]
  const float* all_parts;  // [ranks, ...]
};

// Both softmaxes of row r of `count`.
__device__ __forceinline__ void JoinRows(const Shard& shard, int64_t r, int64_t count,
                                         RowSoftmax& p, RowSoftmax& q) {
  const float* shares = shard.shares + r * kKlSoftmaxFloats;
  p = JoinRow(shares, shard.ranks, count * kKlSoftmaxFloats);
  q = JoinRow(shares + kSoftmaxFields, shard.ranks, count * kKlSoftmaxFloats);
}

// One block a token: this rank's shares of both softmaxes.
__global__ void __launch_bounds__(kLogitThreads) KlDivergenceSendKernel(Chunk chunk, Shard shard) {
  SharedMemory shared;
  const RowSlots slots = TakeRowSlots(shared);
  const int64_t r = blockIdx.x;
  OnlineSoftmax my_teacher, my_student;
  ReadRows(chunk.teacher + r * chunk.stride, chunk.student + r * chunk.stride, chunk.vocabulary,
           my_teacher, my_student);
  const RowSoftmax p = CombinePart(my_teacher, slots);
  const RowSoftmax q = CombinePart(my_student, slots);
  if (threadIdx.x == 0) {
    float* message = shard.my_shares + r * kKlSoftmaxFloats;
    PutShare(p, shard.first_row, message);
    PutShare(q, shard.first_row, message + kSoftmaxFields);
  }
}

// One block a token: the gradient, and this rank's part of the sums that need the maxima of the
// whole row.
__global__ void __launch_bounds__(kLogitThreads) KlDivergencePartKernel(Chunk chunk, Shard shard) {
  SharedMemory shared;
  const RowSlots slots = TakeRowSlots(shared);
  RowSoftmax* joined = shared.Take<RowSoftmax>(2);
  const int64_t r = blockIdx.x;
  if (threadIdx.x == 0) JoinRows(shard, r, gridDim.x, joined[0], joined[1]);
  __syncthreads();
  const RowSoftmax p = joined[0];
  const RowSoftmax q = joined[1];
  const RowSums sums = DivergenceRow(chunk, chunk.teacher + r * chunk.stride,
                                     chunk.student + r * chunk.stride, p, q, slots.sums);
  if (threadIdx.x == 0) {
    float* message = shard.my_parts + r * kKlPartFloats;
    SplitDouble(sums.difference, message);
    SplitDouble(sums.energy, message + 2);
  }
}

constexpr int kReceiveThreads = 128;

// One thread a token: the numbers of the whole row.
__global__ void __launch_bounds__(kReceiveThreads)
    KlDivergenceReceiveKernel(Chunk chunk, Shard shard, int64_t count) {
  const int64_t r = int64_t{blockIdx.x} * kReceiveThreads + threadIdx.x;
  if (r >= count) return;
  RowSoftmax p, q;
  JoinRows(shard, r, count, p, q);
  RowSums sums = {0.0, 0.0};
  for (int k = 0; k < shard.ranks; ++k) {
    const float* part = shard.all_parts + (k * count + r) * kKlPartFloats;
    sums.difference += JoinDouble(part);
    sums.energy += JoinDouble(part + 2);
  }
  PutFields(chunk, r, sums, p, q);
}

void Check(const ConstTensor& teacher_hidden, const ConstTensor& teacher_weight,
           const ConstTensor& student_hidden, const ConstTensor& student_weight,
           const KlDivergenceOptions& options, const Tensor& dhidden, const Tensor& dweight,
           int64_t vocabulary) {
  for (const ConstTensor& x : {teacher_hidden, teacher_weight, student_hidden, student_weight}) {
    SALA_CHECK(x.rank() == 2) << ShapeText(x);
    SALA_CHECK(x.dim(1) % 8 == 0) << ShapeText(x) << ": a GPU takes widths of multiples of 8";
  }
  const int64_t tokens = student_hidden.dim(0);
  const int64_t rows = student_weight.dim(0);
  const int64_t width = student_weight.dim(1);
  SALA_CHECK(vocabulary >= 1 && vocabulary <= int64_t{1} << 30)
      << "vocabulary " << vocabulary << ": a GPU takes 1 to 2^30";
  CheckShape(teacher_hidden, {tokens, teacher_weight.dim(1)}, DType::kBF16);
  CheckShape(teacher_weight, {rows, teacher_weight.dim(1)}, DType::kBF16);
  CheckShape(student_hidden, {tokens, width}, DType::kBF16);
  CheckShape(student_weight, {rows, width}, DType::kBF16);
  SALA_CHECK(options.chunk_tokens >= 1 && options.temperature > 0)
      << options.chunk_tokens << ", " << options.temperature;
  if (!dhidden.empty()) CheckShape(dhidden, {tokens, width}, DType::kBF16);
  if (!dweight.empty()) CheckShape(dweight, {rows, width});
}

}  // namespace

KlDivergenceResult cuda::KlDivergence(const Context& ctx, const ConstTensor& teacher_hidden,
                                      const ConstTensor& all_teacher_weight,
                                      const ConstTensor& student_hidden,
                                      const ConstTensor& all_student_weight,
                                      const KlDivergenceOptions& options, const Tensor& dhidden,
                                      const Tensor& all_dweight) {
  const Op op(ctx, "KlDivergence", all_student_weight);
  const ShardRows rows = RowsOf(options.shard, all_student_weight.dim(0));
  Check(teacher_hidden, all_teacher_weight, student_hidden, all_student_weight, options, dhidden,
        all_dweight, rows.vocabulary);
  const RankExchange* exchange = options.shard.exchange;
  const int64_t tokens = student_hidden.dim(0);
  // Padding takes part in nothing.
  const int64_t vocabulary = rows.count;
  const ConstTensor teacher_weight = all_teacher_weight.Rows(0, vocabulary);
  const ConstTensor student_weight = all_student_weight.Rows(0, vocabulary);
  const Tensor dweight = all_dweight.empty() ? Tensor() : all_dweight.Rows(0, vocabulary);
  if (tokens == 0) return {};
  const int64_t chunk_tokens = std::min(options.chunk_tokens, tokens);
  const int64_t stride = LogitStride(vocabulary);
  const double tau = options.temperature;
  const auto teacher_scale = static_cast<float>(options.teacher_logit_scale / tau);
  const auto student_scale = static_cast<float>(options.student_logit_scale / tau);
  const ArenaScope scope(*ctx.scratch);
  const Tensor teacher_buffer = ctx.scratch->New(DType::kF32, {chunk_tokens, stride});
  const Tensor student_buffer = ctx.scratch->New(DType::kF32, {chunk_tokens, stride});
  auto* fields = static_cast<double*>(
      ctx.scratch->Allocate(static_cast<size_t>(kFields * tokens) * sizeof(double)));
  auto* sums = static_cast<double*>(ctx.scratch->Allocate(kFields * sizeof(double)));
  const Tensor gradients =
      Tensor(student_buffer.raw(), DType::kBF16, {chunk_tokens, 2 * stride}, DeviceKind::kCuda)
          .Columns(0, vocabulary);
  Chunk chunk = {.teacher = op.Data<float>(teacher_buffer),
                 .student = op.Data<float>(student_buffer),
                 .stride = stride,
                 .vocabulary = static_cast<int>(vocabulary),
                 .fields = fields,
                 .tokens = tokens,
                 .slope = tau * double{options.grad_scale} * double{options.student_logit_scale},
                 .gradient = !dhidden.empty() || !dweight.empty()};
  std::optional<GatherBuffer> shares, parts;
  Shard shard = {};
  if (exchange != nullptr) {
    shares.emplace(ctx, *exchange, chunk_tokens * kKlSoftmaxFloats);
    parts.emplace(ctx, *exchange, chunk_tokens * kKlPartFloats);
    shard = {.first_row = rows.first,
             .ranks = static_cast<int>(exchange->ranks),
             .my_shares = op.Data<float>(shares->mine),
             .shares = op.Data<float>(shares->all),
             .my_parts = op.Data<float>(parts->mine),
             .all_parts = op.Data<float>(parts->all)};
  }
  for (int64_t begin = 0; begin < tokens; begin += chunk_tokens) {
    const int64_t end = std::min(tokens, begin + chunk_tokens);
    const int64_t count = end - begin;
    cuda::GemmNT(ctx, teacher_hidden.Rows(begin, end), teacher_weight,
                 teacher_buffer.Rows(0, count).Columns(0, vocabulary), {.alpha = teacher_scale});
    cuda::GemmNT(ctx, student_hidden.Rows(begin, end), student_weight,
                 student_buffer.Rows(0, count).Columns(0, vocabulary), {.alpha = student_scale});
    const dim3 grid(static_cast<unsigned>(count));
    if (exchange == nullptr) {
      op.Launch(KlDivergenceRowKernel, grid, dim3(kLogitThreads), kRowSlotBytes, chunk);
    } else {
      op.Launch(KlDivergenceSendKernel, grid, dim3(kLogitThreads), kRowSlotBytes, chunk, shard);
      shares->Gather(ctx, *exchange, count * kKlSoftmaxFloats);
      op.Launch(KlDivergencePartKernel, grid, dim3(kLogitThreads),
                kRowSlotBytes + SharedBytes<RowSoftmax>(2), chunk, shard);
      parts->Gather(ctx, *exchange, count * kKlPartFloats);
      op.Launch(KlDivergenceReceiveKernel,
                dim3(static_cast<unsigned>(CeilDiv(count, kReceiveThreads))), dim3(kReceiveThreads),
                0, chunk, shard, count);
    }
    chunk.fields += count;
    const Tensor gradient = gradients.Rows(0, count);
    if (!dhidden.empty()) {
      cuda::GemmNN(ctx, gradient, student_weight, dhidden.Rows(begin, end), {});
    }
    if (!dweight.empty()) {
      cuda::GemmTN(ctx, gradient, student_hidden.Rows(begin, end), dweight,
                   {.write = Write::kAccumulate});
    }
  }
  SumTokens(op, fields, kFields, tokens, sums);
  double found[kFields];
  ctx.gpu->Download(found, sums, sizeof(found));  // the one wait
  KlDivergenceResult result;
  result.loss_sum = tau * tau * found[kDivergence];
  result.teacher_entropy = found[kEntropy];
  result.agree = static_cast<int64_t>(found[kAgree]);
  result.tokens = tokens;
  return result;
}

}  // namespace sala::kernels
