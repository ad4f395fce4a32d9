#include "core/elementary.h"
#include "kernels/common/vectorized.h"
#include "kernels/kl_divergence/kl_divergence.h"

#include <optional>

#include "kernels/common/softmax_row.h"
#include "kernels/common/tensor_check.h"
#include "kernels/cuda_kernels.h"
#include "kernels/gemm/gemm.h"

namespace sala::kernels {
namespace {

constexpr int64_t kLogitRowGrain = 4;

struct RowResult {
  double divergence = 0;
  double teacher_entropy = 0;
  bool agree = false;
};

struct RowSums {
  double teacher = 0;     // sum of e^a,        a = teacher's logit - its largest
  double student = 0;     // sum of e^b,        b = student's logit - its largest
  double difference = 0;  // sum of e^a (a - b)
  double energy = 0;      // sum of e^a a
};

// The four sums; the logits become e^a and e^b.
SALA_INLINE RowSums SumRow(int64_t n, float teacher_max, float student_max, float* teacher,
                           float* student) {
  RowSums sums;
  for (int64_t begin = 0; begin < n; begin += kSumBlock) {
    const int64_t count = std::min(kSumBlock, n - begin);
    float* x = teacher + begin;
    float* y = student + begin;
    float difference[kSumBlock];
    float energy[kSumBlock];
    for (int64_t i = 0; i < count; ++i) {
      const float a = x[i] - teacher_max;
      const float b = y[i] - student_max;
      const float e = Exp(a);
      difference[i] = e * (a - b);
      energy[i] = e * a;
      x[i] = e;
      y[i] = Exp(b);
    }
    const auto add = [count](const float* from) {
      return static_cast<double>(LaneSum<float>(count, [from](int64_t i) { return from[i]; }));
    };
    sums.teacher += add(x);
    sums.student += add(y);
    sums.difference += add(difference);
    sums.energy += add(energy);
  }
  return sums;
}

// With p = e^a / A and q = e^b / B: KL = sum p (a - b) - log A + log B and entropy = log A - sum p
// a.
RowResult Divergence(const RowSums& sums, bool agree) {
  RowResult result;
  result.agree = agree;
  result.divergence =
      sums.difference / sums.teacher - PortableLog(sums.teacher) + PortableLog(sums.student);
  result.teacher_entropy = PortableLog(sums.teacher) - sums.energy / sums.teacher;
  return result;
}

// e^b in the student's row becomes slope * (q - p).
SALA_INLINE void GradientRow(int64_t n, double slope, double teacher_sum, double student_sum,
                             const float* teacher, float* student) {
  const auto student_factor = static_cast<float>(slope / student_sum);
  const auto teacher_factor = static_cast<float>(slope / teacher_sum);
  SALA_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    student[i] = student[i] * student_factor - teacher[i] * teacher_factor;
  }
}

SALA_INLINE RowResult DivergenceRowBody(int64_t n, double slope, float* teacher, float* student) {
  const float teacher_max = RowMax(n, teacher);
  const float student_max = RowMax(n, student);
  const bool agree = FirstIndexOf(n, teacher, teacher_max) == FirstIndexOf(n, student, student_max);
  const RowSums sums = SumRow(n, teacher_max, student_max, teacher, student);
  GradientRow(n, slope, sums.teacher, sums.student, teacher, student);
  return Divergence(sums, agree);
}
constexpr Vectorized<DivergenceRowBody> DivergenceRow{};

// The first message of a row: the shares of both softmaxes.
SALA_INLINE void SendShare(const ShardRows& shard, const float* logits, float* message) {
  SoftmaxShare share;
  share.largest = RowMax(shard.count, logits);
  const int64_t first = FirstIndexOf(shard.count, logits, share.largest);
  if (first < shard.count) share.id = static_cast<int32_t>(shard.first + first);
  share.sum = ExpSum(shard.count, ShiftOf(share.largest), logits);
  PutShare(share, message);
}
SALA_INLINE void SendSharesBody(const ShardRows& shard, const float* teacher, const float* student,
                                float* message) {
  SendShare(shard, teacher, message);
  SendShare(shard, student, message + kSoftmaxFields);
}
constexpr Vectorized<SendSharesBody> SendShares{};

// The second message: this rank's part of the sums that are relative to the maxima of the whole
// row. The student's row becomes slope * (q - p).
SALA_INLINE void SendPartsBody(int64_t n, double slope, const SoftmaxShare& p,
                               const SoftmaxShare& q, float* teacher, float* student,
                               float* message) {
  const RowSums sums = SumRow(n, p.largest, q.largest, teacher, student);
  GradientRow(n, slope, p.sum, q.sum, teacher, student);
  SplitDouble(sums.difference, message);
  SplitDouble(sums.energy, message + 2);
}
constexpr Vectorized<SendPartsBody> SendParts{};

// What the ranks have sent of the rows of a chunk, both messages.
class Received {
 public:
  Received(const RankExchange& exchange, const GatherBuffer& shares, const GatherBuffer& parts,
           int64_t rows)
      : ranks_(exchange.ranks),
        rows_(rows),
        shares_(shares.all.Data<float>()),
        parts_(parts.all.Data<float>()) {}
  SoftmaxShare Teacher(int64_t r) const {
    return JoinShares(shares_ + r * kKlSoftmaxFloats, ranks_, rows_ * kKlSoftmaxFloats);
  }
  SoftmaxShare Student(int64_t r) const {
    return JoinShares(shares_ + r * kKlSoftmaxFloats + kSoftmaxFields, ranks_,
                      rows_ * kKlSoftmaxFloats);
  }
  RowResult Result(int64_t r) const {
    const SoftmaxShare p = Teacher(r);
    const SoftmaxShare q = Student(r);
    RowSums sums = {p.sum, q.sum};
    for (int64_t k = 0; k < ranks_; ++k) {
      const float* part = parts_ + (k * rows_ + r) * kKlPartFloats;
      sums.difference += JoinDouble(part);
      sums.energy += JoinDouble(part + 2);
    }
    return Divergence(sums, p.id == q.id);
  }

 private:
  int64_t ranks_, rows_;
  const float* shares_;
  const float* parts_;
};

void Check(const Context& ctx, const ConstTensor& teacher_hidden, const ConstTensor& teacher_weight,
           const ConstTensor& student_hidden, const ConstTensor& student_weight,
           const KlDivergenceOptions& options, const Tensor& dhidden, const Tensor& dweight) {
  CheckCpu(ctx);
  for (const ConstTensor& x : {teacher_hidden, teacher_weight, student_hidden, student_weight}) {
    SALA_CHECK(x.rank() == 2) << ShapeText(x);
  }
  const int64_t tokens = student_hidden.dim(0);
  const int64_t vocabulary = student_weight.dim(0);
  CheckShape(teacher_hidden, {tokens, teacher_weight.dim(1)});
  CheckShape(teacher_weight, {vocabulary, teacher_weight.dim(1)});
  CheckShape(student_hidden, {tokens, student_weight.dim(1)});
  CheckShape(student_weight, {vocabulary, student_weight.dim(1)});
  SALA_CHECK(options.chunk_tokens >= 1 && options.temperature > 0)
      << options.chunk_tokens << ", " << options.temperature;
  if (!dhidden.empty()) CheckShape(dhidden, {tokens, student_weight.dim(1)});
  if (!dweight.empty()) CheckShape(dweight, {vocabulary, student_weight.dim(1)});
}

}  // namespace

KlDivergenceResult KlDivergence(const Context& ctx, const ConstTensor& teacher_hidden,
                                const ConstTensor& all_teacher_weight,
                                const ConstTensor& student_hidden,
                                const ConstTensor& all_student_weight,
                                const KlDivergenceOptions& options, const Tensor& dhidden,
                                const Tensor& all_dweight) {
  if (ctx.cuda()) {
    return Cuda(ctx).KlDivergence(ctx, teacher_hidden, all_teacher_weight, student_hidden,
                                  all_student_weight, options, dhidden, all_dweight);
  }
  Check(ctx, teacher_hidden, all_teacher_weight, student_hidden, all_student_weight, options,
        dhidden, all_dweight);
  const ShardRows shard = RowsOf(options.shard, all_student_weight.dim(0));
  const RankExchange* exchange = options.shard.exchange;
  const int64_t tokens = student_hidden.dim(0);
  // Padding takes part in nothing.
  const int64_t vocabulary = shard.count;
  const ConstTensor teacher_weight = all_teacher_weight.Rows(0, vocabulary);
  const ConstTensor student_weight = all_student_weight.Rows(0, vocabulary);
  const Tensor dweight = all_dweight.empty() ? Tensor() : all_dweight.Rows(0, vocabulary);
  const int64_t chunk = std::min(options.chunk_tokens, tokens);
  const double tau = options.temperature;
  // The buffers hold logits / tau; the gradient on the student's logits themselves is tau (q - p).
  const double slope = tau * static_cast<double>(options.grad_scale);
  const auto teacher_scale = static_cast<float>(options.teacher_logit_scale / tau);
  const auto student_scale = static_cast<float>(options.student_logit_scale / tau);
  const ArenaScope scope(*ctx.scratch);
  const Tensor teacher_buffer = ctx.scratch->New(DType::kF32, {chunk, vocabulary});
  const Tensor student_buffer = ctx.scratch->New(DType::kF32, {chunk, vocabulary});
  auto* rows = static_cast<RowResult*>(
      ctx.scratch->Allocate(static_cast<size_t>(chunk) * sizeof(RowResult)));
  std::optional<GatherBuffer> shares, parts;
  if (exchange != nullptr) {
    shares.emplace(ctx, *exchange, chunk * kKlSoftmaxFloats);
    parts.emplace(ctx, *exchange, chunk * kKlPartFloats);
  }
  KlDivergenceResult result;
  result.tokens = tokens;
  for (int64_t begin = 0; begin < tokens; begin += chunk) {
    const int64_t end = std::min(tokens, begin + chunk);
    const Tensor teacher = teacher_buffer.Rows(0, end - begin);
    const Tensor student = student_buffer.Rows(0, end - begin);
    GemmNT(ctx, teacher_hidden.Rows(begin, end), teacher_weight, teacher, {.alpha = teacher_scale});
    GemmNT(ctx, student_hidden.Rows(begin, end), student_weight, student, {.alpha = student_scale});
    const auto for_rows = [&](const auto& row) {
      ctx.pool->For(end - begin, kLogitRowGrain, [&](int64_t r0, int64_t r1) {
        for (int64_t r = r0; r < r1; ++r) row(r);
      });
    };
    if (exchange == nullptr) {
      for_rows([&](int64_t r) {
        rows[r] = DivergenceRow(vocabulary, slope, teacher.Row<float>(r), student.Row<float>(r));
      });
    } else {
      const Received received(*exchange, *shares, *parts, end - begin);
      for_rows([&](int64_t r) {
        SendShares(shard, teacher.Row<float>(r), student.Row<float>(r),
                   shares->mine.Data<float>() + r * kKlSoftmaxFloats);
      });
      shares->Gather(ctx, *exchange, (end - begin) * kKlSoftmaxFloats);
      for_rows([&](int64_t r) {
        SendParts(vocabulary, slope, received.Teacher(r), received.Student(r),
                  teacher.Row<float>(r), student.Row<float>(r),
                  parts->mine.Data<float>() + r * kKlPartFloats);
      });
      parts->Gather(ctx, *exchange, (end - begin) * kKlPartFloats);
      for_rows([&](int64_t r) { rows[r] = received.Result(r); });
    }
    for (int64_t r = 0; r < end - begin; ++r) {
      result.loss_sum += tau * tau * rows[r].divergence;
      result.teacher_entropy += rows[r].teacher_entropy;
      result.agree += rows[r].agree ? 1 : 0;
    }
    const float alpha = options.student_logit_scale;
    if (!dhidden.empty()) {
      GemmNN(ctx, student, student_weight, dhidden.Rows(begin, end), {.alpha = alpha});
    }
    if (!dweight.empty()) {
      GemmTN(ctx, student, student_hidden.Rows(begin, end), dweight,
             {.alpha = alpha, .write = Write::kAccumulate});
    }
  }
  return result;
}

}  // namespace sala::kernels
