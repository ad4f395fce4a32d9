#include "recipes/step_loop.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <optional>

#include "core/clock.h"
#include "core/cuda_module.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/memory.h"
#include "core/progress.h"
#include "core/trace.h"
#include "kernels/tensor_ops/tensor_ops.h"
#include "parallel/comm_log.h"
#include "parallel/ordered_sum.h"
#include "recipes/schedule.h"
#include "recipes/stragglers.h"

namespace sala::recipes {
namespace {

using Values = std::vector<std::pair<std::string, double>>;

std::string Format(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

// JSON has no NaN: null stands for "not measured".
nlohmann::json NumberOrNull(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
}

double NumberOr(const nlohmann::json& object, const char* key, double fallback) {
  const auto it = object.find(key);
  return it == object.end() || !it->is_number() ? fallback : it->get<double>();
}

// What a phase counts over its whole life, saved in the checkpoint.
struct Progress {
  int64_t step = 0;  // done
  int64_t tokens = 0;
  int64_t targets = 0;
  double seconds = 0;
  int64_t skipped = 0;
  int64_t clipped = 0;
  int64_t bad_in_a_row = 0;
  double first_loss = std::numeric_limits<double>::quiet_NaN();
  double last_loss = std::numeric_limits<double>::quiet_NaN();
  double validation_before = std::numeric_limits<double>::quiet_NaN();
  double validation_after = std::numeric_limits<double>::quiet_NaN();

  nlohmann::json ToJson() const {
    return {{"tokens", tokens},
            {"targets", targets},
            {"seconds", seconds},
            {"skipped", skipped},
            {"clipped", clipped},
            {"bad_in_a_row", bad_in_a_row},
            {"first_loss", NumberOrNull(first_loss)},
            {"last_loss", NumberOrNull(last_loss)},
            {"validation_before", NumberOrNull(validation_before)},
            {"validation_after", NumberOrNull(validation_after)}};
  }

  StepLoopSummary Summary() const {
    return {.steps = step,
            .tokens = tokens,
            .seconds = seconds,
            .first_loss = first_loss,
            .last_loss = last_loss,
            .validation_before = validation_before,
            .validation_after = validation_after};
  }

  static Progress FromJson(const nlohmann::json& json, int64_t step) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    Progress p;
    p.step = step;
    p.tokens = json.value("tokens", int64_t{0});
    p.targets = json.value("targets", int64_t{0});
    p.seconds = NumberOr(json, "seconds", 0);
    p.skipped = json.value("skipped", int64_t{0});
    p.clipped = json.value("clipped", int64_t{0});
    p.bad_in_a_row = json.value("bad_in_a_row", int64_t{0});
    p.first_loss = NumberOr(json, "first_loss", nan);
    p.last_loss = NumberOr(json, "last_loss", nan);
    p.validation_before = NumberOr(json, "validation_before", nan);
    p.validation_after = NumberOr(json, "validation_after", nan);
    return p;
  }
};

// One global batch as this rank sees it.
struct StepData {
  std::vector<data::PackedSample> mine;
  StepCounts counts;  // of all ranks
  uint32_t crc = 0;   // of all samples, in order
  Request request = Request::kNone;
};

// Where the time of a step went on this rank.
struct StepTimes {
  double started = 0;  // ClockSeconds()
  double comm_seconds = 0;
  PartSeconds parts{};
};

// The positions of the global batch that a rank takes: each ranks-th one, or, so that the shares
// are subtrees of the sum over micro-batches, as many whole micro-batches in a row as the others.
std::vector<int64_t> ShareOf(const BatchConfig& batch, int64_t rank, int64_t ranks) {
  const int64_t in_a_row =
      batch.rank_independent_sums ? batch.micro_batches() / ranks * batch.micro_batch_sequences : 1;
  std::vector<int64_t> share;
  for (int64_t p = 0; p < batch.global_batch_sequences(); ++p) {
    if (p / in_a_row % ranks == rank) share.push_back(p);
  }
  return share;
}

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
        display_(config.label, config.batch.steps, session.is_root()) {}

  StatusOr<StepLoopSummary> Run(const Checkpoint* resume, const Checkpoint* carry);

 private:
  Status Start(const Checkpoint* resume, const Checkpoint* carry);
  void ReserveTree();
  Status PlanMemory();
  void ReportMemory() const;
  Status ReportRanks();  // collective
  StatusOr<StepData> LoadStep();
  Status Step();
  StatusOr<Values> RunMicroBatches(const StepData& data, double* loss);
  Status AddMicroBatch(const StepData& data, int64_t index, model::ParameterStore& gradients,
                       std::span<double> sums);
  Status SumMicroBatches(const StepData& data, int64_t first, int64_t count, size_t level,
                         model::ParameterStore& gradients, std::span<double> sums);
  // Collective where the step is logged.
  Status Report(const StepData& data, const Values& values, const UpdateResult& update, double lr,
                const StepTimes& times);
  void AddTimes(const StepTimes& times, nlohmann::ordered_json* line);
  void AddBatch(const StepData& data, double step_seconds, nlohmann::ordered_json* line) const;
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
  ProgressDisplay display_;
  Progress progress_;
  Stragglers stragglers_;
  double logged_beside_ = 0;  // of CommQueue::seconds_run
  // Totals when the last logged step and when this step had its summed gradient: nothing runs
  // beside the computation then, so the difference is exact.
  std::map<std::string, parallel::CommTotals> logged_comm_, summed_comm_;
  nlohmann::ordered_json comm_ = nlohmann::ordered_json::object();  // of the last logged step
  size_t planned_arena_ = 0;                                        // bytes, on a GPU
  size_t planned_scratch_ = 0;
  int64_t step_at_start_ = 0;  // of this start of the run
  double seconds_at_start_ = 0;
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
  if (!ctx.cuda()) return OkStatus();
  DeviceOptions options = ctx.gpu->options();
  options.dry = true;
  options.like = ctx.gpu;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Device> dry, OpenCudaDevice(options));
  Arena arena(size_t{64} << 20, dry.get());
  Arena scratch(size_t{64} << 20, dry.get());
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

// What every rank exchanged in the last logged step, and the memory it needed.
Status StepLoop::ReportRanks() {
  const nlohmann::ordered_json mine = {{"comm", comm_},
                                       {"memory",
                                        {{"buffers", HostBufferPeakBytes()},
                                         {"activations", session_.arena().peak_bytes()},
                                         {"work_space", session_.scratch().peak_bytes()},
                                         {"resident", ResidentPeakBytes()}}}};
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                        session_.world().AllGatherText(mine.dump()));
  auto ranks = nlohmann::ordered_json::array();
  for (const std::string& text : all) ranks.push_back(nlohmann::ordered_json::parse(text));
  session_.WriteRanks({{"step", session_.global_step},
                       {"stage", config_.position.stage},
                       {"phase", config_.position.phase},
                       {"ranks", ranks}});
  return OkStatus();
}

StatusOr<StepData> StepLoop::LoadStep() {
  const PartScope part(StepPart::kData);
  parallel::Communicator& group = session_.mesh().dp_group();
  const int64_t batch = config_.batch.global_batch_sequences();
  StepData step;
  // [targets, tokens, request, then the CRC of every sample]: one integer all-reduce tells all
  // ranks everything they must agree on.
  std::vector<int64_t> sums(static_cast<size_t>(2 + batch), 0);
  Status status = OkStatus();
  std::optional<parallel::Section> section(std::in_place, session_.watchdog(),
                                           parallel::Phase::kData);
  for (const int64_t p :
       ShareOf(config_.batch, session_.mesh().dp_rank(), session_.mesh().dp_size())) {
    auto sample = stream_.Get(progress_.step * batch + p);
    status = sample.status();
    if (!status.ok()) break;
    sums[0] += sample->targets();
    sums[1] += stream_.seq_len() - sample->padding;
    sums[static_cast<size_t>(2 + p)] = data::DataCrc(*sample);
    step.mine.push_back(std::move(sample).value());
  }
  section.reset();
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), status));
  SALA_RETURN_IF_ERROR(group.AllReduce(std::span<int64_t>(sums), parallel::Reduce::kSum));
  auto request = static_cast<int64_t>(PendingRequest());
  SALA_RETURN_IF_ERROR(
      session_.world().AllReduce(std::span<int64_t>(&request, 1), parallel::Reduce::kMax));
  step.counts = {.targets = sums[0], .tokens = sums[1]};
  step.crc = Crc32c(sums.data() + 2, static_cast<size_t>(batch) * sizeof(int64_t));
  step.request = static_cast<Request>(request);
  return step;
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
  SALA_ASSIGN_OR_RETURN(const StepData data, LoadStep());
  request_ = data.request;
  double loss = 0;
  SALA_ASSIGN_OR_RETURN(const Values values, RunMicroBatches(data, &loss));
  SALA_RETURN_IF_ERROR(reducer_.Finish());
  summed_comm_ = parallel::ProcessCommLog().Totals();
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
  stragglers_.Add(ClockSeconds() - started, comm_seconds);
  PartSeconds parts = PartSecondsOfThisThread();
  for (size_t p = 0; p < kStepParts; ++p) parts[p] -= parts_before[p];
  SALA_RETURN_IF_ERROR(Report(data, values, update, lr, {started, comm_seconds, parts}));
  if (progress_.bad_in_a_row > config_.optimizer.max_bad_steps) {
    return NonFinite("the limit is " + std::to_string(config_.optimizer.max_bad_steps) +
                     " (optimizer.max_bad_steps)");
  }
  return OkStatus();
}

Status StepLoop::Report(const StepData& data, const Values& values, const UpdateResult& update,
                        double lr, const StepTimes& times) {
  const double step_seconds = ClockSeconds() - times.started;
  const double rate = static_cast<double>(data.counts.tokens) / step_seconds;
  const bool last = progress_.step == config_.batch.steps;
  const bool logged =
      last || progress_.step % session_.config().run.log_every_steps == 0 || update.skipped;
  if (logged && session_.world().size() > 1) {
    SALA_ASSIGN_OR_RETURN(const nlohmann::ordered_json line,
                          stragglers_.Gather(session_.world(), session_.global_step));
    session_.WriteStragglers(line);
  }
  if (logged) {
    comm_ = parallel::CommDelta(logged_comm_, summed_comm_);
    logged_comm_ = summed_comm_;
  }
  if (!session_.is_root()) return OkStatus();
  if (logged) {
    nlohmann::ordered_json line = {{"step", session_.global_step},
                                   {"stage", config_.position.stage},
                                   {"phase", config_.position.phase},
                                   {"stage_step", progress_.step},
                                   {"time", static_cast<int64_t>(std::time(nullptr))},
                                   {"tokens", data.counts.tokens},
                                   {"target_tokens", data.counts.targets},
                                   {"tokens_total", progress_.tokens}};
    for (const auto& [name, value] : values) line[name] = NumberOrNull(value);
    line["loss_hex"] = HexFloat(values.front().second);
    line["grad_norm"] = NumberOrNull(update.grad_norm);
    line["grad_norm_hex"] = HexFloat(update.grad_norm);
    line["clipped"] = update.clipped;
    line["lr"] = lr;
    line["skipped"] = update.skipped;
    line["tokens_per_s"] = rate;
    line["step_ms"] = step_seconds * 1e3;
    AddTimes(times, &line);
    const double beside = session_.mesh().queue().seconds_run();
    line["comm_beside_ms"] = (beside - logged_beside_) * 1e3;
    logged_beside_ = beside;
    line["comm"] = comm_;
    AddBatch(data, step_seconds, &line);
    line["arena_peak_mib"] = static_cast<double>(session_.arena().peak_bytes()) / (1 << 20);
    line["data_crc"] = Hex32(data.crc);
    session_.WriteMetrics(line);
  }
  display_.Update(progress_.step, values.front().first + " " +
                                      Format("%.4f", values.front().second) + "  lr " +
                                      Format("%.2e", lr) + "  " + Format("%.0f", rate) + " tok/s");
  session_.WriteStatus("training", config_.position.stage, session_.global_step);
  return OkStatus();
}

void StepLoop::AddTimes(const StepTimes& times, nlohmann::ordered_json* line) {
  for (const auto& [part, key] :
       {std::pair(StepPart::kData, "data_ms"), std::pair(StepPart::kForward, "forward_ms"),
        std::pair(StepPart::kLoss, "loss_ms"), std::pair(StepPart::kBackward, "backward_ms"),
        std::pair(StepPart::kOptimizer, "optim_ms")})
    (*line)[key] = times.parts[static_cast<size_t>(part)] * 1e3;
  (*line)["comm_ms"] = times.comm_seconds * 1e3;
  (*line)["save_stall_ms"] = session_.TakeSaveSeconds() * 1e3;
}

void StepLoop::AddBatch(const StepData& data, double step_seconds,
                        nlohmann::ordered_json* line) const {
  const auto slots =
      static_cast<double>(config_.batch.global_batch_sequences() * config_.batch.seq_len_tokens);
  (*line)["padding_share"] = 1 - static_cast<double>(data.counts.tokens) / slots;
  // Of the samples that this rank has.
  double work = 0;
  double documents = 0;
  for (const data::PackedSample& sample : data.mine) {
    const int64_t kept = stream_.seq_len() - sample.padding;
    for (size_t s = 1; s < sample.cu_seqlens.size() && sample.cu_seqlens[s] <= kept; ++s) {
      work += task_.WorkOf(sample.cu_seqlens[s] - sample.cu_seqlens[s - 1]);
      ++documents;
    }
  }
  if (!data.mine.empty())
    (*line)["segments_mean"] = documents / static_cast<double>(data.mine.size());
  const parallel::MeshConfig& mesh = session_.mesh().config();
  if (work > 0)
    (*line)["gflop_per_s"] = work / static_cast<double>(mesh.cp * mesh.tp) / step_seconds / 1e9;
  (*line)["stage_steps"] = config_.batch.steps;
  const double per_step = (progress_.seconds - seconds_at_start_) /
                          static_cast<double>(progress_.step - step_at_start_);
  (*line)["eta_s"] = per_step * static_cast<double>(config_.batch.steps - progress_.step);
  (*line)["host_mem_gib"] = static_cast<double>(ResidentPeakBytes()) / (1 << 30);
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
  logged_comm_ = parallel::ProcessCommLog().Totals();
  step_at_start_ = progress_.step;
  seconds_at_start_ = progress_.seconds;
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
  display_.Finish();
  ReportMemory();
  SALA_RETURN_IF_ERROR(ReportRanks());
  if (session_.is_root()) {
    for (const std::string& row : stragglers_.Table(session_.watchdog().hosts()))
      SALA_LOG(Info) << row;
  }
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

StepLoopSummary SummaryOf(const Checkpoint& checkpoint) {
  const nlohmann::json progress =
      checkpoint.info().trainer.value("progress", nlohmann::json::object());
  return Progress::FromJson(progress, PositionOf(checkpoint).phase_step).Summary();
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

Status CheckShares(const BatchConfig& batch, const parallel::MeshConfig& mesh) {
  if (!batch.rank_independent_sums) return OkStatus();
  if (mesh.cp > 1 || mesh.tp > 1 || mesh.zero_stage > 1) {
    return MakeError(ExitCode::kConfig, "CFG-MESH",
                     "batch.rank_independent_sums is on with parallel.cp " +
                         std::to_string(mesh.cp) + ", tp " + std::to_string(mesh.tp) +
                         " and zero_stage " + std::to_string(mesh.zero_stage) +
                         "; sums are independent of the number of ranks with cp 1, tp 1 and "
                         "zero_stage 0 or 1 only: change these or turn it off");
  }
  const int64_t ranks = mesh.dp;
  const bool power_of_two = (ranks & (ranks - 1)) == 0;
  if (power_of_two && batch.micro_batches() % ranks == 0) return OkStatus();
  return MakeError(ExitCode::kConfig, "CFG-MESH",
                   "batch.rank_independent_sums is on, but the " +
                       std::to_string(batch.micro_batches()) + " micro-batches of a step (" +
                       std::to_string(batch.global_batch_sequences()) + " sequences by " +
                       std::to_string(batch.micro_batch_sequences) +
                       ") cannot be shared out evenly over " + std::to_string(ranks) +
                       " ranks; expected a number of ranks that is a power of two and divides "
                       "them: change the ranks, the batch or micro_batch_sequences");
}

model::Batch MakeBatch(const std::vector<data::PackedSample>& samples) {
  model::Batch batch;
  batch.cu_seqlens.push_back(0);
  for (const data::PackedSample& sample : samples) {
    const auto base = static_cast<int32_t>(batch.tokens.size());
    const int64_t kept = static_cast<int64_t>(sample.tokens.size()) - sample.padding;
    batch.tokens.insert(batch.tokens.end(), sample.tokens.begin(), sample.tokens.begin() + kept);
    batch.labels.insert(batch.labels.end(), sample.labels.begin(), sample.labels.begin() + kept);
    batch.positions.insert(batch.positions.end(), sample.positions.begin(),
                           sample.positions.begin() + kept);
    for (size_t s = 1; s < sample.cu_seqlens.size(); ++s) {
      if (sample.cu_seqlens[s] <= kept) batch.cu_seqlens.push_back(base + sample.cu_seqlens[s]);
    }
  }
  return batch;
}

StatusOr<std::vector<model::Batch>> HeldOutBatches(const data::ValidationSet& set,
                                                   const parallel::Mesh& mesh) {
  std::vector<model::Batch> batches;
  for (int64_t first = 0; first < set.size(); first += mesh.dp_size()) {
    std::vector<data::PackedSample> samples;
    if (const int64_t i = first + mesh.dp_rank(); i < set.size()) {
      SALA_ASSIGN_OR_RETURN(data::PackedSample sample, set.Get(i));
      samples.push_back(std::move(sample));
    }
    batches.push_back(MakeBatch(samples));
  }
  return batches;
}

}  // namespace sala::recipes
