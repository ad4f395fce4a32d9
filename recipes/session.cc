#include "recipes/session.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <utility>

#include "core/checkpoint.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/json.h"
#include "core/log.h"
#include "core/memory.h"
#include "core/trace.h"
#include "kernels/common/instruction_set.h"
#include "parallel/comm_log.h"
#include "parallel/mpi_communicator.h"
#include "recipes/rank_device.h"

namespace sala::recipes {
namespace {

// Written by signal handlers, so only lock-free atomics.
std::atomic<int64_t> pending_request{0};
std::atomic<bool> hangup{false};
std::atomic<int> stop_signals{0};

void OnSave(int) {
  int64_t none = 0;
  pending_request.compare_exchange_strong(none, static_cast<int64_t>(Request::kSave));
}

void OnStop(int signal) {
  pending_request = static_cast<int64_t>(Request::kStop);
  // SIGUSR2 comes from schedulers and may come twice; a repeated SIGTERM or SIGINT means "now".
  if (signal != SIGUSR2 && ++stop_signals > 1) _exit(128 + signal);
}

void OnHangup(int) { hangup = true; }

void Handle(int signal, void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  sigaction(signal, &action, nullptr);
}

std::string RankLogName(int rank) {
  char name[64];
  std::snprintf(name, sizeof(name), "logs/rank-%05d.log", rank);
  return name;
}

}  // namespace

void InstallSignalHandlers() {
  Handle(SIGUSR1, OnSave);
  Handle(SIGUSR2, OnStop);
  Handle(SIGTERM, OnStop);
  Handle(SIGINT, OnStop);
  Handle(SIGHUP, OnHangup);
}

Request PendingRequest() {
  if (hangup.exchange(false)) ReopenLogFile();
  return static_cast<Request>(pending_request.load());
}

void ClearSaveRequest() {
  auto save = static_cast<int64_t>(Request::kSave);
  pending_request.compare_exchange_strong(save, static_cast<int64_t>(Request::kNone));
}

Session::Session(parallel::Communicator& world, const PipelineConfig& config)
    : world_(world), config_(config), pool_(static_cast<int>(config.run.threads)) {
  ctx_.pool = &pool_;
}

void Session::LogDevice() const {
  if (device_ == nullptr) return;
  const DeviceInfo& info = device_->info();
  SALA_LOG(Info) << "device " << info.index << " (" << info.bus_id << "): " << info.name
                 << ", compute capability " << info.compute_capability / 10 << "."
                 << info.compute_capability % 10 << ", " << (info.memory_bytes >> 20) << " MiB"
                 << (info.emulated ? ", emulated on the CPU" : "")
                 << "; between ranks: " << mesh_->transport();
}

// The device of this rank, and the arenas on it.
Status Session::OpenDevice() {
  if (config_.run.device == DeviceKind::kCuda) {
    SALA_ASSIGN_OR_RETURN(device_, OpenRankDevice(world_, config_.run.deterministic));
    ctx_.device = DeviceKind::kCuda;
    ctx_.gpu = device_.get();
  }
  arena_ = std::make_unique<Arena>(kArenaBlockBytes, device_.get());
  scratch_ = std::make_unique<Arena>(kArenaBlockBytes, device_.get());
  ctx_.scratch = scratch_.get();
  return OkStatus();
}

Status Session::PrepareDirectory() {
  for (const char* folder : {"logs", "metrics", "checkpoints", "stages"}) {
    SALA_RETURN_IF_ERROR(MakeDirectories(path(folder)));
  }
  if (config_.run.break_lock) SALA_RETURN_IF_ERROR(RemoveTree(path("RUN.lock")));
  SALA_ASSIGN_OR_RETURN(RunLock lock, RunLock::Acquire(config_.run.dir));
  lock_.emplace(std::move(lock));
  SALA_RETURN_IF_ERROR(parallel::PrepareFaultDirectory(path("logs"), watchdog_->hosts()));
  if (config_.run.resume == "never" && !ListCheckpoints(checkpoint_root()).empty()) {
    return MakeError(
        ExitCode::kConfig, "RUN-EXISTS",
        config_.run.dir +
            ": run.resume is never, but the directory already holds checkpoints; choose another "
            "run.dir, or set run.resume to auto");
  }
  SALA_ASSIGN_OR_RETURN(train_metrics_, MetricsFile::Open(path("metrics/train.jsonl")));
  SALA_ASSIGN_OR_RETURN(valid_metrics_, MetricsFile::Open(path("metrics/valid.jsonl")));
  SALA_ASSIGN_OR_RETURN(rank_metrics_, MetricsFile::Open(path("metrics/ranks.jsonl")));
  SALA_ASSIGN_OR_RETURN(gate_metrics_, MetricsFile::Open(path("metrics/gates.jsonl")));
  dashboards_ = Dashboards(config_.run, config_.name, parallel::HostName());
  if (world_.size() > 1) {
    SALA_ASSIGN_OR_RETURN(straggler_metrics_, MetricsFile::Open(path("metrics/stragglers.jsonl")));
  }
  return RemoveLeftovers(checkpoint_root());
}

StatusOr<std::unique_ptr<Session>> Session::Open(parallel::Communicator& world,
                                                 const PipelineConfig& config) {
  const std::vector<int64_t>& traced = config.run.trace.ranks;
  if (const auto beyond = std::find_if(traced.begin(), traced.end(),
                                       [&world](int64_t rank) { return rank >= world.size(); });
      !config.run.trace.steps.empty() && beyond != traced.end()) {
    return MakeError(ExitCode::kConfig, "CFG-CONFLICT",
                     "run.trace.ranks names rank " + std::to_string(*beyond) + ", the run has " +
                         std::to_string(world.size()) + " rank(s), from 0; correct it");
  }
  std::unique_ptr<Session> session(new Session(world, config));
  SALA_ASSIGN_OR_RETURN(session->watchdog_,
                        parallel::Watchdog::Start(config.run.watchdog, parallel::ProcessCommLog(),
                                                  session->path("logs"), world));
  const parallel::Section section(session->watchdog(), parallel::Phase::kInit);
  SALA_RETURN_IF_ERROR(session->OpenDevice());
  // Of data ranks only until a stage brings its own (UseMesh): the first one may be done, and need
  // not fit the ranks of today.
  SALA_ASSIGN_OR_RETURN(
      session->mesh_,
      parallel::Mesh::Create(world, {.transport = config.stages[0].parallel.transport},
                             session->ctx_));
  auto tokenizer = data::LoadTokenizer(config.stages[0].tokenizer);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, tokenizer.status()));
  session->tokenizer_ = std::move(tokenizer).value();
  const Status prepared = session->is_root() ? session->PrepareDirectory() : OkStatus();
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, prepared));
  SALA_RETURN_IF_ERROR(
      parallel::AgreeOnStatus(world, OpenLogFile(session->path(RankLogName(world.rank())))));
  session->LogDevice();
  session->start_ = MeasureStart(parallel::LaunchedByMpi());
  return session;
}

void Session::ExpectResident(const StageConfig& stage, const std::string& phase,
                             const model::ModelConfig& model) {
  if (resident_unknown_) return;
  const auto plan =
      PlanResident(start_, stage, config_.run, world_.size(), world_.rank(), phase, model);
  if (plan.ok()) {
    planned_resident_ = std::max(planned_resident_, plan->total());
    return;
  }
  SALA_LOG(Warn) << "the peak of resident memory is not planned: " << MessageOf(plan.status());
  resident_unknown_ = true;
  planned_resident_ = 0;
}

Status Session::WriteConfig() {
  if (!is_root()) return OkStatus();
  for (const auto& [name, text] : EmitPipeline(config_))
    SALA_RETURN_IF_ERROR(WriteFileAtomically(path(name), text));
  SALA_RETURN_IF_ERROR(WriteEnvironment());
  return PathExists(path("tokenizer")) ? OkStatus() : tokenizer_->SaveTo(path("tokenizer"));
}

Status Session::WriteEnvironment() const {
  nlohmann::ordered_json environment;
  for (const auto& [name, text] : config_.run.environment) environment[name] = text;
  environment["hosts"] = watchdog_->hosts();  // by rank
  environment["ranks"] = world_.size();
  environment["threads_per_rank"] = config_.run.threads;
  environment["instruction_set"] = kernels::NameOf(kernels::CurrentInstructionSet());
  environment["device"] = device_ == nullptr ? "cpu" : device_->info().name;
  environment["time"] = static_cast<int64_t>(std::time(nullptr));
  return WriteFileAtomically(path("environment.json"), DumpJson(environment, 1) + "\n");
}

Status Session::UseMesh(const parallel::MeshConfig& config) {
  mesh_.reset();
  SALA_ASSIGN_OR_RETURN(mesh_, parallel::Mesh::Create(world_, config, ctx_));
  if (world_.size() == 1) return OkStatus();
  SALA_ASSIGN_OR_RETURN(std::vector<std::string> hosts,
                        mesh_->tp_group().AllGatherText(parallel::HostName()));
  std::sort(hosts.begin(), hosts.end());
  int64_t spread = hosts.front() == hosts.back() ? 0 : 1;
  SALA_RETURN_IF_ERROR(world_.AllReduce(std::span<int64_t>(&spread, 1), parallel::Reduce::kMax));
  if (!is_root()) return OkStatus();
  const parallel::MeshConfig& mesh = mesh_->config();
  SALA_LOG(Info) << "mesh: dp " << mesh.dp << " x cp " << mesh.cp << " x tp " << mesh.tp
                 << ", ZeRO stage " << mesh.zero_stage;
  if (spread != 0) {
    SALA_LOG(Warn) << "parallel.tp is " << mesh.tp
                   << ", and some of its groups span hosts: every layer exchanges activations over "
                      "the network; choose a tp that divides the ranks of each host";
  }
  return OkStatus();
}

void Session::ReserveMemory(size_t arena_bytes, size_t scratch_bytes) {
  // The old blocks go first, so that the new ones may lie where they were.
  arena_->Reserve(0);
  scratch_->Reserve(0);
  arena_->Reserve(arena_bytes);
  scratch_->Reserve(scratch_bytes);
}

void Session::WarnOnce(const Status& status) {
  if (status.ok() || warned_) return;
  warned_ = true;
  SALA_LOG(Warn) << "metrics, status or summary are not written any more: " << MessageOf(status);
}

void Session::WriteMetrics(const nlohmann::ordered_json& line) {
  if (!is_root()) return;
  WarnOnce(train_metrics_.Write(line));
  WarnOnce(dashboards_.Train(line));
}

void Session::WriteValidation(const nlohmann::ordered_json& line) {
  if (!is_root()) return;
  WarnOnce(valid_metrics_.Write(line));
  WarnOnce(dashboards_.Validation(line));
}

void Session::WriteStragglers(const nlohmann::ordered_json& line) {
  if (is_root()) WarnOnce(straggler_metrics_.Write(line));
}

void Session::WriteRanks(const nlohmann::ordered_json& line) {
  if (is_root()) WarnOnce(rank_metrics_.Write(line));
}

void Session::WriteGates(const nlohmann::ordered_json& line) {
  if (is_root()) WarnOnce(gate_metrics_.Write(line));
}

void Session::WriteSummary(const nlohmann::ordered_json& rows) {
  if (!is_root()) return;
  WarnOnce(WriteFileAtomically(path("summary.json"), rows.dump(1) + "\n"));
}

void Session::ShowEvaluations() {
  if (is_root()) WarnOnce(dashboards_.Evaluations());
}

void Session::BeginSteps(bool resumed) {
  if (!is_root() || steps_begun_) return;
  steps_begun_ = true;
  WarnOnce(train_metrics_.Write({{"event", resumed ? "resume" : "start"}, {"step", global_step}}));
  WarnOnce(dashboards_.Start(global_step + 1));
}

double Session::TakeSaveSeconds() {
  const double before = save_seconds_;
  save_seconds_ = PartSecondsOfThisThread()[static_cast<size_t>(StepPart::kSave)];
  return save_seconds_ - before;
}

void Session::BeginTrace(int64_t step) {
  if (!config_.run.trace.Records(step, world_.rank())) return;
  traced_step_ = step;
  StartTrace();
}

void Session::EndTrace() {
  if (traced_step_ == 0) return;
  const std::string text = TraceJson(sala::EndTrace(), world_.rank(), parallel::HostName());
  char name[64];
  std::snprintf(name, sizeof(name), "traces/step-%06lld-rank-%04d.json",
                static_cast<long long>(traced_step_), world_.rank());
  traced_step_ = 0;
  Status status = MakeDirectories(path("traces"));
  if (status.ok()) status = WriteFileAtomically(path(name), text);
  WarnOnce(status);
}

void Session::WriteStatus(const std::string& state, const std::string& stage, int64_t step) {
  if (!is_root()) return;
  WarnOnce(dashboards_.State(state, stage, step));
  const double now = ClockSeconds();
  // The file is synced to disk: once a second is often enough for a liveness probe.
  if (state == last_status_state_ && now - last_status_seconds_ < 1) return;
  last_status_seconds_ = now;
  last_status_state_ = state;
  const nlohmann::ordered_json status = {{"step", step},
                                         {"stage", stage},
                                         {"state", state},
                                         {"time", static_cast<int64_t>(std::time(nullptr))}};
  WarnOnce(WriteFileAtomically(path("status.json"), status.dump() + "\n"));
}

}  // namespace sala::recipes
