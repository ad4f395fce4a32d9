#include "recipes/step_loop.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <exception>
#include <limits>
#include <optional>

#include "core/clock.h"
#include "core/cuda_module.h"
#include "core/log.h"
#include "core/trace.h"
#include "kernels/tensor_ops/tensor_ops.h"
#include "parallel/comm_log.h"
#include "parallel/ordered_sum.h"
#include "recipes/schedule.h"
#include "recipes/step_report.h"

namespace sala::recipes {
namespace {

using Values = StepValues;

// The next step of the run and what follows it, where run.trace asks for it.
class StepTrace {
 public:
  explicit StepTrace(Session& session) : session_(session) {
    session.BeginTrace(session.global_step + 1);
  }
  StepTrace(const StepTrace&) = delete;
  StepTrace& operator=(const StepTrace&) = delete;
  ~StepTrace() { session_.EndTrace(); }

 private:
  Session& session_;
};

class StepLoop {
 public:
  StepLoop(Session& session, const StepLoopConfig& config, StepTask& task,
           data::SampleStream& stream)
      : session_(session),
        config_(config),
        task_(task),
        stream_(stream),
        reducer_(session.ctx(), task.params(), session.mesh(), config.batch.rank_independent_sums),
        gradients_(reducer_.store()),
        optimizer_(
            session.ctx(), config.optimizer, task.config(), task.parameters(),
            [&task](const model::ParameterSpec& spec) { return task.Trainable(spec); },
            session.mesh(), reducer_),
        report_(session, config, task) {}

  StatusOr<StepLoopSummary> Run(const Checkpoint* resume, const Checkpoint* carry);

 private:
  Status Start(const Checkpoint* resume, const Checkpoint* carry);
  void ReserveTree();
  Status PlanMemory();
  void ReportMemory() const;
  Status Step();
  StatusOr<Values> RunMicroBatches(const StepData& data, double* loss);
  Status AddMicroBatch(const StepData& data, int64_t index, model::ParameterStore& gradients,
                       std::span<double> sums);
  Status SumMicroBatches(const StepData& data, int64_t first, int64_t count, size_t level,
                         model::ParameterStore& gradients, std::span<double> sums);
  StatusOr<double> Validate();
  Status NonFinite(const std::string& why) const;
  Status Save(bool final_step);
  // That this thread has spent in collectives, or waiting for those beside the computation.
  double CommSeconds() const {
    return parallel::CommSecondsOfThisThread() + session_.mesh().queue().seconds_waited();
  }

  Session& session_;
  const StepLoopConfig& config_;
  StepTask& task_;
  data::SampleStream& stream_;
  GradientReducer reducer_;
  model::ParameterStore& gradients_;
  std::deque<model::ParameterStore> right_;  // by level of the tree of SumMicroBatches
  Optimizer optimizer_;
  StepReport report_;
  Progress progress_;
  size_t planned_arena_ = 0;  // bytes, on a GPU
  size_t planned_scratch_ = 0;
  Request request_ = Request::kNone;
};

Status StepLoop::Start(const Checkpoint* resume, const Checkpoint* carry) {
  SALA_RETURN_IF_ERROR(CheckShares(config_.batch, session_.mesh().config()));
  if (config_.batch.rank_independent_sums && session_.ctx().cuda() &&
      !session_.config().run.deterministic) {
    return MakeError(ExitCode::kConfig, "CFG-CONFLICT",
                     "stage " + config_.position.stage +
                         ": batch.rank_independent_sums fixes the order of every sum, "
                         "run.deterministic: false leaves it to libraries; change one of them");
  }
  ReserveTree();
  SALA_RETURN_IF_ERROR(
      stream_.CheckEpochs(config_.batch.steps * config_.batch.global_batch_sequences()));
  if (resume != nullptr) {
    const nlohmann::json& trainer = resume->info().trainer;
    if (trainer.contains("cursor")) SALA_RETURN_IF_ERROR(stream_.CheckCursor(trainer["cursor"]));
    progress_ = Progress::FromJson(trainer.value("progress", nlohmann::json::object()),
                                   PositionOf(*resume).phase_step);
    optimizer_.set_updates(trainer.value("updates", int64_t{0}));
    SALA_RETURN_IF_ERROR(LoadParameters(*resume, task_.params()));
    optimizer_.TakeParameters(session_.ctx());
    SALA_RETURN_IF_ERROR(optimizer_.Load(session_.ctx(), *resume));
    SALA_LOG(Info) << config_.position.stage << "/" << config_.position.phase
                   << ": resumed after step " << progress_.step << " from " << resume->directory();
  } else if (carry != nullptr) {
    optimizer_.set_updates(carry->info().trainer.value("updates", int64_t{0}));
    SALA_RETURN_IF_ERROR(optimizer_.Load(session_.ctx(), *carry));
  }
  session_.BeginSteps(resume != nullptr);
  if (session_.is_root()) {
    SALA_LOG(Info) << config_.position.stage << "/" << config_.position.phase << ": "
                   << DescribeSchedule(config_.schedule, config_.batch.steps);
  }
  return OkStatus();
}

// The buffers of SumMicroBatches, before memory is planned: one for each level of its tree, whose
// longest branch is the left one.
void StepLoop::ReserveTree() {
  if (!config_.batch.rank_independent_sums) return;
  const int64_t ranks = session_.mesh().dp_size();
  const int64_t share = (config_.batch.micro_batches() + ranks - 1) / ranks;
  for (int64_t count = share; count > 1; count = parallel::SumTreeLeft(count))
    right_.emplace_back(gradients_.specs(), DType::kF32, session_.ctx().gpu);
}

// Documents of `tokens` tokens each.
model::Batch FullDocuments(int64_t tokens, int64_t documents) {
  model::Batch batch;
  batch.cu_seqlens.push_back(0);
  for (int64_t d = 0; d < documents; ++d) {
    for (int64_t i = 0; i < tokens; ++i) {
      batch.tokens.push_back(0);
      batch.labels.push_back(i + 1 < tokens ? 0 : -1);
      batch.positions.push_back(static_cast<int32_t>(i));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>((d + 1) * tokens));
  }
  return batch;
}

// On a GPU: measures on a device without memory what a micro-batch of the longest documents needs,
// and lays the arenas out as one block of that size each. The same code runs as in training, so
// plan and use agree; batches of other documents may need a little more, which the arenas add.
Status StepLoop::PlanMemory() {
  const Context& ctx = session_.ctx();
  if (!ctx.cuda()) {
    session_.ReserveMemory(0, 0);  // not what a phase of another shape has left
    return OkStatus();
  }
  DeviceOptions options = ctx.gpu->options();
  options.dry = true;
  options.like = ctx.gpu;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Device> dry, OpenCudaDevice(options));
  Arena arena(kArenaBlockBytes, dry.get());
  Arena scratch(kArenaBlockBytes, dry.get());
  Context plan = ctx;
  plan.gpu = dry.get();
  plan.scratch = &scratch;
  const model::Batch batch =
      FullDocuments(config_.batch.seq_len_tokens, config_.batch.micro_batch_sequences);
  std::vector<double> sums(task_.SumNames().size(), 0.0);
  const auto comm_before = parallel::ProcessCommLog().Totals();
  {
    const parallel::Mesh::Planning planning(session_.mesh());
    SALA_RETURN_IF_ERROR(task_.MicroBatch(plan, arena, batch,
                                          {.targets = batch.targets(), .tokens = batch.size()},
                                          gradients_, sums));
  }
  // A rank that cannot be planned would leave the others waiting.
  const auto exchanged = parallel::CommDelta(comm_before, parallel::ProcessCommLog().Totals());
  SALA_CHECK(exchanged.empty()) << "planning memory has exchanged " << exchanged.dump();
  planned_arena_ = arena.peak_bytes();
  planned_scratch_ = scratch.peak_bytes();
  session_.ReserveMemory(0, 0);
  const size_t free = ctx.gpu->free_bytes();
  if (planned_arena_ + planned_scratch_ > free) {
    return MakeError(ExitCode::kDevice, "CUDA-MEMORY",
                     "a micro-batch of " + std::to_string(config_.batch.micro_batch_sequences) +
                         " x " + std::to_string(config_.batch.seq_len_tokens) + " tokens needs " +
                         std::to_string((planned_arena_ + planned_scratch_) >> 20) +
                         " MiB of activations and work space, the device has " +
                         std::to_string(free >> 20) +
                         " MiB free beside parameters and optimizer; use a smaller "
                         "micro_batch_sequences, recompute: true, or more ranks");
  }
  session_.ReserveMemory(planned_arena_, planned_scratch_);
  return OkStatus();
}

void StepLoop::ReportMemory() const {
  if (!session_.is_root() || !session_.ctx().cuda()) return;
  SALA_LOG(Info) << config_.position.stage << "/" << config_.position.phase
                 << ": device memory: activations " << (session_.arena().peak_bytes() >> 10)
                 << " KiB (planned " << (planned_arena_ >> 10) << "), work space "
                 << (session_.scratch().peak_bytes() >> 10) << " KiB (planned "
                 << (planned_scratch_ >> 10) << ")";
}

Status StepLoop::AddMicroBatch(const StepData& data, int64_t index,
                               model::ParameterStore& gradients, std::span<double> sums) {
  const TraceScope trace("micro-batch", index);
  const int64_t per_batch = config_.batch.micro_batch_sequences;
  const auto samples = static_cast<int64_t>(data.mine.size());
  const auto begin = data.mine.begin() + std::min(samples, index * per_batch);
  const auto left = static_cast<int64_t>(data.mine.end() - begin);
  // Also where nothing but padding is left: all ranks exchange the same.
  const model::Batch batch = MakeBatch({begin, begin + std::min(per_batch, left)});
  return task_.MicroBatch(session_.ctx(), session_.arena(), batch, data.counts, gradients, sums);
}

// `gradients` and `sums` become those of the micro-batches [first, first + count), each computed on
// its own and added by the tree of parallel/ordered_sum.h; `gradients` is overwritten, `sums` comes
// as zeros. A buffer for each level of the tree holds the sum of its right half.
Status StepLoop::SumMicroBatches(const StepData& data, int64_t first, int64_t count, size_t level,
                                 model::ParameterStore& gradients, std::span<double> sums) {
  if (count == 1) {
    gradients.Zero();
    return AddMicroBatch(data, first, gradients, sums);
  }
  const int64_t left = parallel::SumTreeLeft(count);
  SALA_RETURN_IF_ERROR(SumMicroBatches(data, first, left, level, gradients, sums));
  model::ParameterStore& right = right_[level];
  std::vector<double> right_sums(sums.size(), 0.0);
  SALA_RETURN_IF_ERROR(
      SumMicroBatches(data, first + left, count - left, level + 1, right, right_sums));
  kernels::Add(session_.ctx(), right.Flat(), gradients.Flat());
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += right_sums[i];
  return OkStatus();
}

StatusOr<Values> StepLoop::RunMicroBatches(const StepData& data, double* loss) {
  const int64_t per_batch = config_.batch.micro_batch_sequences;
  auto mine = static_cast<int64_t>(data.mine.size());
  // Where ranks exchange within a micro-batch, those with fewer samples go along with an empty one.
  const int64_t dp = session_.mesh().dp_size();
  if (session_.mesh().zero_stage() >= 2)
    mine = (config_.batch.global_batch_sequences() + dp - 1) / dp;
  const int64_t count = std::max<int64_t>(1, (mine + per_batch - 1) / per_batch);
  std::vector<double> sums(task_.SumNames().size(), 0.0);
  reducer_.BeginStep();
  if (config_.batch.rank_independent_sums) {
    SALA_RETURN_IF_ERROR(SumMicroBatches(data, 0, count, 0, gradients_, sums));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      reducer_.BeginMicroBatch(i + 1 == count);
      SALA_RETURN_IF_ERROR(AddMicroBatch(data, i, gradients_, sums));
    }
  }
  SALA_RETURN_IF_ERROR(session_.world().AllReduce(std::span<double>(sums), parallel::Reduce::kSum));
  Values values = task_.Values(sums, data.counts);
  *loss = values.front().second;
  return values;
}

Status StepLoop::NonFinite(const std::string& why) const {
  return MakeError(ExitCode::kNumbers, "NUM-NONFINITE",
                   "stage " + config_.position.stage + ", step " +
                       std::to_string(session_.global_step) + ": loss or gradient was not finite " +
                       std::to_string(progress_.bad_in_a_row) + " time(s) in a row, " + why +
                       "; lower the learning rate or look at the data of these steps");
}

Status StepLoop::Step() {
  const parallel::Section section(session_.watchdog(), parallel::Phase::kStep,
                                  session_.global_step);
  const double started = ClockSeconds();
  const double comm_before = CommSeconds();
  const PartSeconds parts_before = PartSecondsOfThisThread();
  SALA_ASSIGN_OR_RETURN(const StepData data,
                        LoadStep(session_, config_.batch, stream_, progress_.step));
  request_ = data.request;
  double loss = 0;
  SALA_ASSIGN_OR_RETURN(const Values values, RunMicroBatches(data, &loss));
  SALA_RETURN_IF_ERROR(reducer_.Finish());
  report_.GradientSummed();
  const double lr = LearningRate(config_.schedule, progress_.step, config_.batch.steps);
  std::optional<PartScope> part(std::in_place, StepPart::kOptimizer);
  SALA_ASSIGN_OR_RETURN(const UpdateResult update,
                        optimizer_.Update(session_.ctx(), lr, std::isfinite(loss)));
  part.reset();

  ++progress_.step;
  ++session_.global_step;
  progress_.tokens += data.counts.tokens;
  progress_.targets += data.counts.targets;
  progress_.clipped += update.clipped ? 1 : 0;
  progress_.last_loss = loss;
  if (progress_.step == 1) progress_.first_loss = loss;
  if (update.skipped) {
    ++progress_.skipped;
    ++progress_.bad_in_a_row;
    if (session_.is_root())
      SALA_LOG(Warn) << "step " << session_.global_step << ": loss " << loss << ", gradient norm "
                     << update.grad_norm << ": not finite, the update is skipped ("
                     << progress_.bad_in_a_row << " in a row)";
  } else {
    progress_.bad_in_a_row = 0;
  }
  progress_.seconds += ClockSeconds() - started;
  const double comm_seconds = CommSeconds() - comm_before;
  PartSeconds parts = PartSecondsOfThisThread();
  for (size_t p = 0; p < kStepParts; ++p) parts[p] -= parts_before[p];
  SALA_RETURN_IF_ERROR(
      report_.Step(data, values, update, lr, progress_, {started, comm_seconds, parts}));
  if (progress_.bad_in_a_row > config_.optimizer.max_bad_steps) {
    return NonFinite("the limit is " + std::to_string(config_.optimizer.max_bad_steps) +
                     " (optimizer.max_bad_steps)");
  }
  return OkStatus();
}

StatusOr<double> StepLoop::Validate() {
  const parallel::Section section(session_.watchdog(), parallel::Phase::kEvaluation,
                                  session_.global_step);
  session_.WriteStatus("evaluating", config_.position.stage, session_.global_step);
  SALA_ASSIGN_OR_RETURN(const Values values, task_.Validate(session_));
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  nlohmann::ordered_json line = {{"step", session_.global_step},
                                 {"stage", config_.position.stage},
                                 {"phase", config_.position.phase},
                                 {"stage_step", progress_.step}};
  for (const auto& [name, value] : values) line[name] = NumberOrNull(value);
  session_.WriteValidation(line);
  return values.front().second;
}

Status StepLoop::Save(bool final_step) {
  const PartScope part(StepPart::kSave);
  // A save may be the end of the loop, which must not meet gathering that needs longer than
  // CommQueue::Drain waits.
  task_.parameters().Settle();
  optimizer_.ReadShard(session_.ctx());
  SaveRequest request;
  request.position = config_.position;
  request.position.phase_step = progress_.step;
  request.position.stage_final = final_step && config_.final_phase;
  request.model = &task_.config();
  request.params = &task_.params();
  request.optimizer = &optimizer_;
  request.trainer = {
      {"progress", progress_.ToJson()},
      {"cursor", stream_.Cursor(progress_.step * config_.batch.global_batch_sequences())},
      {"schedule_step", progress_.step}};
  if (config_.extra_trainer.is_object()) request.trainer.update(config_.extra_trainer);
  request.config_yaml = config_.config_yaml;
  request.parent = config_.parent;
  request.policy = config_.checkpoint;
  return SaveCheckpoint(session_, request, final_step || request_ == Request::kStop).status();
}

StatusOr<StepLoopSummary> StepLoop::Run(const Checkpoint* resume, const Checkpoint* carry) {
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), Start(resume, carry)));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), PlanMemory()));
  const int64_t steps = config_.batch.steps;
  if (progress_.step == 0) {
    SALA_ASSIGN_OR_RETURN(progress_.validation_before, Validate());
  }
  SALA_RETURN_IF_ERROR(session_.mesh().queue().WaitAll());
  report_.Begin(progress_);
  while (progress_.step < steps) {
    const StepTrace trace(session_);
    SALA_RETURN_IF_ERROR(Step());
    const bool last = progress_.step == steps;
    const int64_t validate_every = config_.validation.every_steps;
    if (last || (validate_every > 0 && progress_.step % validate_every == 0)) {
      SALA_ASSIGN_OR_RETURN(progress_.validation_after, Validate());
    }
    // While steps are skipped the last good checkpoints must stay, so nothing new is saved and
    // nothing old removed.
    const bool bad = progress_.bad_in_a_row > 0;
    if (bad && last) return NonFinite("at the end of the stage");
    const int64_t save_every = config_.checkpoint.every_steps;
    const bool due = save_every > 0 && progress_.step % save_every == 0 && !bad;
    if (last || due || request_ != Request::kNone) {
      SALA_RETURN_IF_ERROR(Save(last));
      ClearSaveRequest();
    }
    // After the last step the pipeline stops, once the stage's result is noted.
    if (request_ == Request::kStop && !last) return Stopped(session_, config_.position.stage);
  }
  task_.parameters().Settle();
  ReportMemory();
  SALA_RETURN_IF_ERROR(report_.End());
  // Another phase of the stage goes on from the store; another stage from the checkpoint.
  if (!config_.final_phase) SALA_RETURN_IF_ERROR(optimizer_.ReadAll(session_.ctx()));
  return progress_.Summary();
}

}  // namespace

Status Stopped(Session& session, const std::string& stage) {
  session.WriteStatus("stopping", stage, session.global_step);
  return MakeError(ExitCode::kRequeue, "STOPPED",
                   "stopped on request after step " + std::to_string(session.global_step) +
                       "; the checkpoint is complete, start the same command again to go on");
}

StatusOr<StepLoopSummary> RunStepLoop(Session& session, const StepLoopConfig& config,
                                      StepTask& task, data::SampleStream& stream,
                                      const Checkpoint* resume, const Checkpoint* carry) {
  StepLoop loop(session, config, task, stream);
  // Where exchanges are under way the way out may end in CommQueue::Drain, which knows no reason.
  const auto explain = [&session](const std::string& why) {
    if (!session.mesh().queue().idle()) SALA_LOG(Error) << why;
  };
  try {
    auto summary = loop.Run(resume, carry);
    if (!summary.ok()) explain(MessageOf(summary.status()));
    return summary;
  } catch (const std::exception& error) {
    explain(error.what());
    throw;
  }
}

}  // namespace sala::recipes
