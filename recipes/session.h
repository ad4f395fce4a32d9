// One rank's view of a run: ranks, threads, memory, the run directory, logs, metrics and stop
// requests. Everything a stage needs besides its configuration.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "core/context.h"
#include "core/device.h"
#include "core/metrics.h"
#include "core/run_lock.h"
#include "data/tokenizer.h"
#include "nlohmann/json.hpp"
#include "parallel/mesh.h"
#include "parallel/watchdog.h"
#include "recipes/config.h"
#include "recipes/dashboards.h"
#include "recipes/resident_plan.h"

namespace sala::recipes {

// What the signals asked for (docs/operations.md): SIGUSR1 save and go on; SIGUSR2, SIGTERM, SIGINT
// save and exit 75.
enum class Request : int64_t { kNone = 0, kSave = 1, kStop = 2 };

// Handlers only set a flag. A second SIGTERM or SIGINT ends the process at once (143, 130).
void InstallSignalHandlers();
Request PendingRequest();  // of this process
void ClearSaveRequest();

class Session {
 public:
  // Creates or opens the run directory: RUN.lock, config.yaml, logs/, metrics/, checkpoints/,
  // tokenizer/. Collective.
  static StatusOr<std::unique_ptr<Session>> Open(parallel::Communicator& world,
                                                 const PipelineConfig& config);

  bool is_root() const { return world_.rank() == 0; }
  parallel::Communicator& world() { return world_; }
  parallel::Mesh& mesh() { return *mesh_; }
  parallel::Watchdog& watchdog() { return *watchdog_; }
  const Context& ctx() const { return ctx_; }
  Arena& arena() { return *arena_; }  // activations; ctx().scratch is another one
  Arena& scratch() { return *scratch_; }
  // Fresh arenas of one block each while nothing is in use, 0 bytes: without a block.
  void ReserveMemory(size_t arena_bytes, size_t scratch_bytes);
  const data::Tokenizer& tokenizer() const { return *tokenizer_; }
  const PipelineConfig& config() const { return config_; }

  std::string path(const std::string& relative) const { return config_.run.dir + "/" + relative; }
  std::string checkpoint_root() const { return path("checkpoints"); }

  // config.yaml, stages/ and tokenizer/ of this start; called once the start is known to be a good
  // one.
  Status WriteConfig();

  // Each stage may split the ranks differently.
  Status UseMesh(const parallel::MeshConfig& config);

  // Rank 0 only; elsewhere these do nothing. Training is worth more than its log: what cannot be
  // written is warned about once and left out.
  void WriteMetrics(const nlohmann::ordered_json& line);     // metrics/train.jsonl
  void WriteValidation(const nlohmann::ordered_json& line);  // metrics/valid.jsonl
  void WriteStragglers(const nlohmann::ordered_json& line);  // metrics/stragglers.jsonl
  void WriteRanks(const nlohmann::ordered_json& line);       // metrics/ranks.jsonl
  void WriteGates(const nlohmann::ordered_json& line);       // metrics/gates.jsonl
  void WriteStatus(const std::string& state, const std::string& stage,
                   int64_t step);                         // status.json, metrics.prom
  void WriteSummary(const nlohmann::ordered_json& rows);  // summary.json
  void ShowEvaluations();                                 // what is new in eval/, to tb/
  // Before the first step of a step loop: where this start of the run goes on, in
  // metrics/train.jsonl and tb/.
  void BeginSteps(bool resumed);
  // Seconds of this rank in saves since the last call: those of an earlier phase too.
  double TakeSaveSeconds();

  // On every rank, around a step and its save: records it where run.trace asks for it, and writes
  // traces/step-SSSSSS-rank-RRRR.json.
  void BeginTrace(int64_t step);
  void EndTrace();

  // This process when the session was open.
  const ProcessStart& start() const { return start_; }
  // The peak of this process's resident memory by the plan of the phases so far; 0: not planned.
  int64_t planned_resident() const { return planned_resident_; }
  // Before a phase of a stage that starts from `model`: adds it. The number is for a log line, so
  // that a phase which cannot be planned is a warning and ends the planning.
  void ExpectResident(const StageConfig& stage, const std::string& phase,
                      const model::ModelConfig& model);
  // Steps done over the whole pipeline; checkpoints are named after it.
  int64_t global_step = 0;
  int64_t failed_saves = 0;  // in a row
  // Rank 0: what checkpoints keep of the model folder the weights came from; "": they came from
  // none (recipes/source_record.h).
  std::string source_record;

 private:
  Session(parallel::Communicator& world, const PipelineConfig& config);
  Status OpenDevice();
  void LogDevice() const;
  Status PrepareDirectory();  // rank 0
  Status WriteEnvironment() const;
  void WarnOnce(const Status& status);
  ProcessStart start_;
  int64_t planned_resident_ = 0;
  bool resident_unknown_ = false;  // a phase could not be planned
  bool warned_ = false;
  bool steps_begun_ = false;
  int64_t traced_step_ = 0;  // 0: none
  double save_seconds_ = 0;  // that were taken
  double last_status_seconds_ = 0;
  std::string last_status_state_;

  parallel::Communicator& world_;
  PipelineConfig config_;
  // The order matters: what uses the device is gone before the device.
  std::unique_ptr<Device> device_;
  ThreadPool pool_;
  std::unique_ptr<Arena> arena_, scratch_;
  Context ctx_;
  std::unique_ptr<parallel::Mesh> mesh_;
  std::optional<RunLock> lock_;  // rank 0
  std::unique_ptr<data::Tokenizer> tokenizer_;
  MetricsFile train_metrics_, valid_metrics_, straggler_metrics_, rank_metrics_, gate_metrics_;
  Dashboards dashboards_;
  std::unique_ptr<parallel::Watchdog> watchdog_;
};

}  // namespace sala::recipes
