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

// One block a token. With a = teacher - its largest, b = student - its largest, A = sum e^a,
// B = sum e^b, p = e^a / A and q = e^b / B:
//   KL = (sum e^a (a - b)) / A - log A + log B      entropy = log A - (sum e^a a) / A
//   gradient = slope (q - p)
// Equal rows give 0 exactly in all of them but the entropy: the same bits on both sides.
__global__ void __launch_bounds__(kLogitThreads) KlDivergenceRowKernel(Chunk chunk) {
  SharedMemory shared;
  const RowSlots slots = TakeRowSlots(shared);
  const int64_t r = blockIdx.x;
  const int n = chunk.vocabulary;
  const float* teacher = chunk.teacher + r * chunk.stride;
  float* student = chunk.student + r * chunk.stride;
  auto* gradient = reinterpret_cast<Bf16*>(student);

  OnlineSoftmax my_teacher, my_student;
  float x[8], y[8];
  for (int column = static_cast<int>(threadIdx.x) * 8; column < n; column += kRowStep) {
    LoadLogits8(teacher, column, n, x);
    LoadLogits8(student, column, n, y);
    my_teacher.Add8(x, column);
    my_student.Add8(y, column);
  }
  const RowSoftmax p = CombineRow(my_teacher, slots);
  const RowSoftmax q = CombineRow(my_student, slots);

  const auto p_factor = static_cast<float>(chunk.slope / p.sum);
  const auto q_factor = static_cast<float>(chunk.slope / q.sum);
  float difference = 0.0F;  // sum of e^a (a - b)
  float energy = 0.0F;      // sum of e^a a
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
  const double all_difference = BlockSum(double{difference}, slots.sums);
  const double all_energy = BlockSum(double{energy}, slots.sums);
  if (threadIdx.x == 0) {
    double* fields = chunk.fields + r;
    const double log_p = log(p.sum);
    fields[kDivergence * chunk.tokens] = all_difference / p.sum - log_p + log(q.sum);
    fields[kEntropy * chunk.tokens] = log_p - all_energy / p.sum;
    fields[kAgree * chunk.tokens] = p.column == q.column ? 1.0 : 0.0;
  }
}

void Check(const ConstTensor& teacher_hidden, const ConstTensor& teacher_weight,
           const ConstTensor& student_hidden, const ConstTensor& student_weight,
           const KlDivergenceOptions& options, const Tensor& dhidden, const Tensor& dweight) {
  for (const ConstTensor& x : {teacher_hidden, teacher_weight, student_hidden, student_weight}) {
    SALA_CHECK(x.rank() == 2) << ShapeText(x);
    SALA_CHECK(x.dim(1) % 8 == 0) << ShapeText(x) << ": a GPU takes widths of multiples of 8";
  }
  const int64_t tokens = student_hidden.dim(0);
  const int64_t vocabulary = student_weight.dim(0);
  const int64_t width = student_weight.dim(1);
  SALA_CHECK(vocabulary >= 1 && vocabulary <= int64_t{1} << 30)
      << "vocabulary " << vocabulary << ": a GPU takes 1 to 2^30";
  CheckShape(teacher_hidden, {tokens, teacher_weight.dim(1)}, DType::kBF16);
  CheckShape(teacher_weight, {vocabulary, teacher_weight.dim(1)}, DType::kBF16);
  CheckShape(student_hidden, {tokens, width}, DType::kBF16);
  CheckShape(student_weight, {vocabulary, width}, DType::kBF16);
  SALA_CHECK(options.chunk_tokens >= 1 && options.temperature > 0)
      << options.chunk_tokens << ", " << options.temperature;
  if (!dhidden.empty()) CheckShape(dhidden, {tokens, width}, DType::kBF16);
  if (!dweight.empty()) CheckShape(dweight, {vocabulary, width});
}

}  // namespace

KlDivergenceResult cuda::KlDivergence(const Context& ctx, const ConstTensor& teacher_hidden,
                                      const ConstTensor& teacher_weight,
                                      const ConstTensor& student_hidden,
                                      const ConstTensor& student_weight,
                                      const KlDivergenceOptions& options, const Tensor& dhidden,
                                      const Tensor& dweight) {
  const Op op(ctx, "KlDivergence", student_weight);
  Check(teacher_hidden, teacher_weight, student_hidden, student_weight, options, dhidden, dweight);
  const int64_t tokens = student_hidden.dim(0);
  const int64_t vocabulary = student_weight.dim(0);
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
  for (int64_t begin = 0; begin < tokens; begin += chunk_tokens) {
    const int64_t end = std::min(tokens, begin + chunk_tokens);
    const int64_t count = end - begin;
    cuda::GemmNT(ctx, teacher_hidden.Rows(begin, end), teacher_weight,
                 teacher_buffer.Rows(0, count).Columns(0, vocabulary), {.alpha = teacher_scale});
    cuda::GemmNT(ctx, student_hidden.Rows(begin, end), student_weight,
                 student_buffer.Rows(0, count).Columns(0, vocabulary), {.alpha = student_scale});
    op.Launch(KlDivergenceRowKernel, dim3(static_cast<unsigned>(count)), dim3(kLogitThreads),
              kRowSlotBytes, chunk);
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
