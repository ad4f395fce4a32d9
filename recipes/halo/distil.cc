#include "recipes/halo/distil.h"

#include <algorithm>
#include <array>

#include "model/loss.h"
#include "parallel/ordered_sum.h"

namespace sala::recipes {
namespace {

using NamedValues = std::vector<std::pair<std::string, double>>;

// Sums of one micro-batch of distillation.
enum DistilSum : size_t { kKl, kEntropy, kAgree, kCrossEntropy, kDistilSums };

// Sums of one held-out batch.
enum ReportSum : size_t {
  kReportKl,
  kReportEntropy,
  kReportAgree,
  kReportTokens,
  kStudentLoss,
  kTeacherLoss,
  kTargets,
  kReportSums
};

}  // namespace

bool IsTrainable(HaloTrainable trainable, const model::ModelConfig& student,
                 const model::ParameterSpec& spec) {
  if (trainable == HaloTrainable::kAll) return true;
  constexpr char kPrefix[] = "model.layers.";
  if (spec.name.find(".self_attn.") == std::string::npos) return false;
  if (trainable == HaloTrainable::kMixers) return true;
  return student.mixer(std::stoll(spec.name.substr(sizeof(kPrefix) - 1))) ==
         model::MixerType::kLightning;
}

StatusOr<DistilReport> CompareModels(const Context& ctx, Arena& arena, const model::Model& teacher,
                                     const model::Model& student,
                                     const std::vector<model::Batch>& batches,
                                     const parallel::Mesh& mesh) {
  std::vector<double> mine;
  const model::RunOptions options;
  for (const model::Batch& batch : batches) {
    const ArenaScope scope(arena);
    const Tensor teacher_hidden = teacher.ForwardOnly(ctx, arena, batch, options);
    const Tensor student_hidden = student.ForwardOnly(ctx, arena, batch, options);
    const kernels::KlDivergenceResult kl =
        model::HeadKl(ctx, arena, teacher, teacher_hidden, student, student_hidden, batch);
    const kernels::CrossEntropyResult student_loss =
        model::HeadCrossEntropy(ctx, arena, student, batch, student_hidden);
    std::array<double, kReportSums> sums{};
    sums[kReportKl] = kl.loss_sum;
    sums[kReportEntropy] = kl.teacher_entropy;
    sums[kReportAgree] = static_cast<double>(kl.agree);
    sums[kReportTokens] = static_cast<double>(kl.tokens);
    sums[kStudentLoss] = student_loss.loss_sum;
    sums[kTeacherLoss] =
        model::HeadCrossEntropy(ctx, arena, teacher, batch, teacher_hidden).loss_sum;
    sums[kTargets] = static_cast<double>(student_loss.targets);
    mine.insert(mine.end(), sums.begin(), sums.end());
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<double> sums,
                        parallel::SumDealtItems(mesh, mine, kReportSums));
  const double tokens = std::max(1.0, sums[kReportTokens]);
  const double targets = std::max(1.0, sums[kTargets]);
  return DistilReport{.tokens = static_cast<int64_t>(sums[kReportTokens]),
                      .kl = sums[kReportKl] / tokens,
                      .student_loss = sums[kStudentLoss] / targets,
                      .teacher_loss = sums[kTeacherLoss] / targets,
                      .agreement = sums[kReportAgree] / tokens,
                      .teacher_entropy = sums[kReportEntropy] / tokens};
}

StudentTask::StudentTask(const Context& ctx, parallel::Mesh& mesh, const model::Model& teacher,
                         Hybrid& student, const std::vector<model::Batch>& held_out)
    : teacher_(teacher),
      student_(student),
      parameters_(ctx, student.params, &mesh),
      model_(student.config, parameters_.store(), model::Spread(mesh)),
      held_out_(held_out) {}

StatusOr<DistilReport> StudentTask::Compare(Session& session) const {
  return CompareModels(session.ctx(), session.arena(), teacher_, model_, held_out_, session.mesh());
}

Status DistilTask::MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                              const StepCounts& counts, model::ParameterStore& gradients,
                              std::span<double> sums) {
  const model::ModelTensors tensors = model::BindTensors(
      config(), gradients, [this](const model::ParameterSpec& spec) { return Trainable(spec); });
  const double ce_scale =
      counts.targets > 0 ? options_.ce_weight / static_cast<double>(counts.targets) : 0.0;
  const model::DistillationResult result = model::DistillationStep(
      ctx, arena, teacher(), model(), batch,
      {.student = {.recompute = options_.recompute},
       .teacher = {},
       .kl_grad_scale = static_cast<float>(1.0 / static_cast<double>(counts.tokens)),
       .ce_grad_scale = static_cast<float>(ce_scale),
       .temperature = static_cast<float>(options_.temperature)},
      tensors);
  sums[kKl] += result.kl.loss_sum;
  sums[kEntropy] += result.kl.teacher_entropy;
  sums[kAgree] += static_cast<double>(result.kl.agree);
  sums[kCrossEntropy] += result.ce.loss_sum;
  return OkStatus();
}

std::vector<std::string> DistilTask::SumNames() const {
  return {"kl", "teacher_entropy", "agree", "cross_entropy"};
}

std::vector<std::pair<std::string, double>> DistilTask::Values(std::span<const double> sums,
                                                               const StepCounts& counts) const {
  const auto tokens = static_cast<double>(counts.tokens);
  const double kl = sums[kKl] / tokens;
  const double ce =
      counts.targets > 0 ? sums[kCrossEntropy] / static_cast<double>(counts.targets) : 0.0;
  return {{"loss", kl + options_.ce_weight * ce},
          {"kl", kl},
          {"teacher_entropy", sums[kEntropy] / tokens},
          {"agreement", sums[kAgree] / tokens}};
}

StatusOr<std::vector<std::pair<std::string, double>>> DistilTask::Validate(Session& session) {
  SALA_ASSIGN_OR_RETURN(const DistilReport report, Compare(session));
  if (report.tokens == 0) return NamedValues{};
  return NamedValues{{"kl", report.kl},
                     {"student_loss", report.student_loss},
                     {"teacher_loss", report.teacher_loss},
                     {"agreement", report.agreement},
                     {"teacher_entropy", report.teacher_entropy}};
}

Status FinetuneTask::MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                                const StepCounts& counts, model::ParameterStore& gradients,
                                std::span<double> sums) {
  const model::ModelTensors tensors = model::BindTensors(config(), gradients);
  const double scale = counts.targets > 0 ? 1.0 / static_cast<double>(counts.targets) : 0.0;
  const kernels::CrossEntropyResult result = model::CrossEntropyStep(
      ctx, arena, model(), batch, {.recompute = recompute_}, static_cast<float>(scale), tensors);
  sums[0] += result.loss_sum;
  sums[1] += static_cast<double>(result.correct);
  return OkStatus();
}

std::vector<std::pair<std::string, double>> FinetuneTask::Values(std::span<const double> sums,
                                                                 const StepCounts& counts) const {
  const auto targets = static_cast<double>(std::max<int64_t>(1, counts.targets));
  return {{"loss", sums[0] / targets}, {"accuracy", sums[1] / targets}};
}

StatusOr<std::vector<std::pair<std::string, double>>> FinetuneTask::Validate(Session& session) {
  SALA_ASSIGN_OR_RETURN(const DistilReport report, Compare(session));
  if (report.tokens == 0) return NamedValues{};
  return NamedValues{{"loss", report.student_loss}, {"kl", report.kl}};
}

}  // namespace sala::recipes
