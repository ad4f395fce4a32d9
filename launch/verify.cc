// sala verify: whether this program, on this machine, computes the user's own configuration right.
// The configuration is made small, checks run in a temporary directory, a table says what holds.
#include <stdlib.h>  // mkdtemp
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

#include "core/file.h"
#include "launch/child.h"
#include "launch/command.h"
#include "nlohmann/json.hpp"
#include "parallel/mpi_communicator.h"
#include "recipes/config.h"
#include "recipes/starting_model.h"
#include "recipes/verify.h"
#include "recipes/verify_data.h"
#include "recipes/verify_scale.h"

namespace sala::launch {
namespace {

using recipes::Verdict;
using recipes::VerifyContext;
using recipes::VerifyRow;

struct VerifyOptions {
  std::string config;
  std::vector<std::string> sets;
  std::vector<std::string> only;
  std::string keep;
  std::string json;
  std::string run;
  std::string device;
  int ranks = 2;
};

// Set by the handler; everything below looks at it between its steps.
std::atomic<int> interrupting_signal{0};

void OnInterrupt(int signal) {
  int none = 0;
  if (!interrupting_signal.compare_exchange_strong(none, signal)) _exit(128 + signal);
}

// While it lives SIGINT, SIGTERM and SIGHUP are noted; then they end the process as ever.
class Interruptible {
 public:
  Interruptible() { Handle(OnInterrupt); }
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;
  ~Interruptible() { Handle(SIG_DFL); }

 private:
  static void Handle(void (*handler)(int)) {
    struct sigaction action = {};
    action.sa_handler = handler;
    for (const int signal : {SIGINT, SIGTERM, SIGHUP}) sigaction(signal, &action, nullptr);
  }
};

// A directory that goes with it, unless it is to be kept.
class WorkDirectory {
 public:
  static StatusOr<std::unique_ptr<WorkDirectory>> Make(const std::string& keep) {
    std::unique_ptr<WorkDirectory> made(new WorkDirectory(!keep.empty()));
    if (keep.empty()) {
      std::error_code error;
      std::string pattern = std::filesystem::temp_directory_path(error) / "sala-verify-XXXXXX";
      if (error || mkdtemp(pattern.data()) == nullptr) {
        return MakeError(ExitCode::kIo, "FILE-WRITE",
                         "no temporary directory can be made" +
                             (error ? std::string() : " as " + pattern) +
                             "; set TMPDIR to a directory to write in");
      }
      made->path_ = pattern;
      return made;
    }
    if (PathExists(keep)) {
      const auto names = ListDirectory(keep);
      if (!names.ok() || !names->empty()) {
        return MakeError(ExitCode::kUsage, "USAGE",
                         "--keep " + keep + ": expected a new or an empty directory");
      }
    }
    SALA_RETURN_IF_ERROR(MakeDirectories(keep));
    std::error_code error;
    made->path_ = std::filesystem::absolute(keep, error).string();
    return made;
  }
  WorkDirectory(const WorkDirectory&) = delete;
  WorkDirectory& operator=(const WorkDirectory&) = delete;
  ~WorkDirectory() {
    if (!keep_ && !path_.empty()) RemoveTree(path_).IgnoreError();
  }
  const std::string& path() const { return path_; }

 private:
  explicit WorkDirectory(bool keep) : keep_(keep) {}
  bool keep_;
  std::string path_;
};

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The last error the program printed; a log of several ranks has the same of each.
std::string LastError(const std::string& output) {
  const auto text = ReadFile(output);
  std::string last;
  std::istringstream lines(text.ok() ? *text : std::string());
  const std::string mark = "sala: error: ";
  for (std::string line; std::getline(lines, line);) {
    if (const size_t at = line.find(mark); at != std::string::npos)
      last = line.substr(at + mark.size());
  }
  return last;
}

// Local runs of a few ranks: as launch/lib.sh sets it for the tests.
std::vector<std::pair<std::string, std::string>> MpiDefaults() {
  std::vector<std::pair<std::string, std::string>> defaults = {
      {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
      {"OMPI_MCA_hwloc_base_binding_policy", "none"},
      {"OMPI_MCA_mpi_yield_when_idle", "1"},
      {"OMPI_MCA_pml", "ob1"},
      {"OMPI_MCA_btl", "self,vader,tcp"}};
  if (geteuid() == 0) {
    defaults.emplace_back("OMPI_ALLOW_RUN_AS_ROOT", "1");
    defaults.emplace_back("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
  }
  return defaults;
}

bool Interrupted() { return interrupting_signal != 0; }

StatusOr<recipes::TrainRun> StartTrain(const std::string& program, const std::string& mpirun,
                                       const recipes::TrainStart& start) {
  ChildProgram child;
  if (start.ranks > 1) child.words = {mpirun, "-np", std::to_string(start.ranks)};
  child.words.insert(child.words.end(), {program, "train", start.config, "--run", start.run});
  child.defaults = MpiDefaults();
  child.output = start.run + ".log";
  if (start.stop) child.stop_when = start.run + "/RUN.lock";
  SALA_RETURN_IF_ERROR(MakeDirectories(start.run.substr(0, start.run.rfind('/'))));
  SALA_ASSIGN_OR_RETURN(const int exit_code, RunChild(child, Interrupted));
  return recipes::TrainRun{exit_code, LastError(child.output)};
}

// What the first stage starts from: only shapes are read. Vocabulary 0: the tokenizer's.
StatusOr<model::ModelConfig> StartingConfig(const recipes::StageConfig& stage) {
  if (stage.model) return *stage.model;
  return recipes::StartingConfig(stage, recipes::MissingModel::kDescribe, nullptr);
}

Status CheckNames(const std::vector<std::string>& only) {
  for (const std::string& name : only) {
    const auto& checks = recipes::VerifyChecks();
    if (std::any_of(checks.begin(), checks.end(),
                    [&](const recipes::VerifyCheck& check) { return name == check.name; }))
      continue;
    std::string names;
    for (const recipes::VerifyCheck& check : checks)
      names += std::string(names.empty() ? "" : ", ") + check.name;
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--only: found '" + Printable(name) + "', expected some of " + names);
  }
  return OkStatus();
}

std::string WhyNoMpirun(const std::string& mpirun) {
  if (!parallel::BuiltWithMpi()) return "this program was built without MPI";
  return mpirun.empty() ? "mpirun was not found in PATH" : "";
}

struct TimedRow {
  VerifyRow row;
  double seconds = 0;
};

void PrintRow(const TimedRow& timed) {
  constexpr size_t kShown = 8;
  const VerifyRow& row = timed.row;
  std::printf("%-12s %-12s %6.1f s  %s\n", row.name.c_str(), NameOf(row.verdict), timed.seconds,
              row.compared.c_str());
  if (!row.measured.empty())
    std::printf("%14s%s; bound: %s\n", "", row.measured.c_str(), row.bound.c_str());
  for (const std::string& note : row.notes) std::printf("%14s%s\n", "", note.c_str());
  for (size_t i = 0; i < row.failures.size() && i < kShown; ++i)
    std::printf("%14s%s\n", "", row.failures[i].c_str());
  if (row.failures.size() > kShown)
    std::printf("%14sand %zu more (--json has all)\n", "", row.failures.size() - kShown);
  std::fflush(stdout);
}

Status WriteJson(const VerifyOptions& options, const recipes::ScaledPipeline& scaled,
                 const std::vector<TimedRow>& rows) {
  if (options.json.empty()) return OkStatus();
  auto table = nlohmann::ordered_json::array();
  for (const TimedRow& timed : rows) {
    const VerifyRow& row = timed.row;
    table.push_back({{"check", row.name},
                     {"verdict", NameOf(row.verdict)},
                     {"compared", row.compared},
                     {"measured", row.measured},
                     {"bound", row.bound},
                     {"failures", row.failures},
                     {"notes", row.notes},
                     {"seconds", timed.seconds}});
  }
  const nlohmann::ordered_json all = {
      {"config", options.config}, {"scaled", scaled.changes}, {"rows", table}};
  return WriteFileAtomically(options.json, all.dump(1) + "\n");
}

// A check that could not be done at all fails with the reason; CHILD-START says nothing of what is
// checked and ends all.
StatusOr<VerifyRow> RunCheck(const recipes::VerifyCheck& check, const VerifyContext& context) {
  StatusOr<VerifyRow> done = check.run(context);
  if (ErrorCodeOf(done.status()) == "CHILD-START") return done;
  VerifyRow row;
  if (done.ok()) {
    row = *std::move(done);
  } else {
    row.compared = check.about;
    row.Fail(MessageOf(done.status()));
  }
  row.name = check.name;
  return row;
}

Status Verdicts(const VerifyOptions& options, const std::vector<TimedRow>& rows) {
  std::string failed;
  for (const TimedRow& timed : rows) {
    if (timed.row.verdict == Verdict::kFails)
      failed += (failed.empty() ? "" : ", ") + timed.row.name;
  }
  if (failed.empty()) return OkStatus();
  return MakeError(ExitCode::kNumbers, "VERIFY-FAILED",
                   options.config + ": " + failed +
                       "; the table names tensor, layer and step, --keep DIR keeps the runs");
}

Status RunChecks(const VerifyOptions& options) {
  SALA_RETURN_IF_ERROR(CheckNames(options.only));
  if (parallel::LaunchedByMpi()) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     "sala verify starts mpirun itself; start it without one");
  }
  std::vector<std::string> sets = options.sets;
  if (!options.run.empty()) sets.push_back("run.dir=" + options.run);
  if (!options.device.empty()) sets.push_back("run.device=" + options.device);
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config,
                        recipes::LoadPipeline(options.config, sets));
  SALA_ASSIGN_OR_RETURN(const model::ModelConfig start, StartingConfig(config.stages[0]));
  SALA_ASSIGN_OR_RETURN(const std::string program, OwnProgram());
  const std::string mpirun = FindInPath("mpirun");
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<WorkDirectory> work,
                        WorkDirectory::Make(options.keep));
  SALA_ASSIGN_OR_RETURN(const recipes::ScaledPipeline scaled,
                        recipes::ScalePipeline(config, start, work->path() + "/data"));
  std::printf("%s, made small:\n", options.config.c_str());
  for (const std::string& line : scaled.changes) std::printf("  %s\n", line.c_str());
  std::printf("\n");
  std::fflush(stdout);
  SALA_RETURN_IF_ERROR(recipes::WriteVerifyDatasets(scaled.datasets));

  VerifyContext context;
  context.scaled = &scaled;
  context.directory = work->path();
  context.user_run = config.run.dir;
  context.device = config.run.device;
  context.ranks = options.ranks;
  context.no_mpirun = WhyNoMpirun(mpirun);
  context.train = [&](const recipes::TrainStart& train) {
    return StartTrain(program, mpirun, train);
  };
  context.progress = [](const std::string& text) {
    std::fprintf(stderr, "sala verify: %s\n", text.c_str());
  };
  context.interrupted = Interrupted;
  std::vector<TimedRow> rows;
  for (const recipes::VerifyCheck& check : recipes::VerifyChecks()) {
    const auto& only = options.only;
    if (!only.empty() && std::find(only.begin(), only.end(), check.name) == only.end()) continue;
    const double began = Seconds();
    StatusOr<VerifyRow> row = RunCheck(check, context);
    if (Interrupted()) return OkStatus();
    SALA_RETURN_IF_ERROR(row.status());
    rows.push_back({*std::move(row), Seconds() - began});
    PrintRow(rows.back());
  }
  if (!options.keep.empty()) std::printf("kept in %s\n", work->path().c_str());
  SALA_RETURN_IF_ERROR(WriteJson(options, scaled, rows));
  return Verdicts(options, rows);
}

Status Verify(const VerifyOptions& options) {
  Status status;
  {
    const Interruptible interruptible;
    status = RunChecks(options);
  }
  // The temporary directory is gone; now the signal does what it does.
  if (Interrupted()) raise(interrupting_signal);
  return status;
}

}  // namespace

void AddVerifyCommand(CommandLine& line) {
  auto options = std::make_shared<VerifyOptions>();
  CLI::App* command =
      AddCommand(line.app, "verify",
                 "checks, on a small form of a configuration, that what it trains is right",
                 "sala verify configs/tiny/pipeline.yaml --only gradients,resume");
  std::string checks = "Checks:";
  for (const recipes::VerifyCheck& check : recipes::VerifyChecks())
    checks += Format("\n  %-12s %s", check.name, check.about);
  command->footer(checks + "\n" + command->get_footer());
  command->add_option("config", options->config, "pipeline or stage file")->required();
  command
      ->add_option("--set", options->sets,
                   "KEY.KEY=VALUE over the file; in a pipeline STAGE.KEY=VALUE")
      ->allow_extra_args(false);  // one value each, so that the file may follow
  command->add_option("--only", options->only, "these checks, with commas between them")
      ->delimiter(',')
      ->allow_extra_args(false);
  command->add_option("--ranks", options->ranks, "1 starts nothing under mpirun")
      ->check(CLI::IsMember({1, 2}))
      ->capture_default_str();
  command->add_option("--run", options->run,
                      "run directory, whose checkpoints are checked too (run.dir)");
  command->add_option("--device", options->device, "cpu or cuda (run.device)");
  command->add_option("--json", options->json, "file for the table, with all failures");
  command->add_option("--keep", options->keep, "new directory for configurations, runs and logs");
  line.OnUse(command, [options] { return Verify(*options); });
}

}  // namespace sala::launch
