// sala train: reads the configuration and runs the pipeline, alone or as one rank of an MPI job.
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "core/device.h"
#include "core/log.h"
#include "launch/build_info.h"
#include "launch/command.h"
#include "parallel/comm_log.h"
#include "parallel/communicator.h"
#include "parallel/mpi_communicator.h"
#include "recipes/config.h"
#include "recipes/session.h"
#include "recipes/stage.h"

namespace sala::launch {
namespace {

struct TrainOptions {
  std::string config;
  std::vector<std::string> sets;
  std::string run;
  std::string resume;
  std::string device;
  bool print_config = false;
  bool break_lock = false;
  std::string trace_steps;
  std::vector<std::pair<std::string, std::string>> environment;
};

// "100", "100-102", "5,100-102" -> "[5,100,101,102]".
StatusOr<std::string> StepList(const std::string& text) {
  constexpr int64_t kMost = 1000;  // a trace of a large model has megabytes
  const Status bad = MakeError(
      ExitCode::kUsage, "USAGE",
      "--trace-steps " + text +
          ": expected steps and ranges of them, from 1, at most 1000 in all, as in 5,100-102");
  std::string list;
  int64_t count = 0;
  std::istringstream pieces(text + ",");
  for (std::string piece; std::getline(pieces, piece, ',');) {
    const size_t dash = piece.find('-');
    const std::optional<int64_t> first = ParseInteger(piece.substr(0, dash));
    const std::optional<int64_t> last =
        dash == std::string::npos ? first : ParseInteger(piece.substr(dash + 1));
    if (!first || !last || *first < 1 || *last < *first || *last - *first >= kMost - count)
      return bad;
    count += *last - *first + 1;
    for (int64_t step = *first; step <= *last; ++step)
      list += (list.empty() ? "" : ",") + std::to_string(step);
  }
  return "[" + list + "]";
}

// For RUN/environment.json.
std::vector<std::pair<std::string, std::string>> Environment(const CommandLine& line) {
  std::string command;
  for (int i = 0; i < line.argc; ++i) command += (i == 0 ? "" : " ") + std::string(line.argv[i]);
  return {{"version", Version()},    {"commit", Commit()},
          {"build", BuildType()},    {"cpu", CpuDescription()},
          {"compiler", __VERSION__}, {"mpi", parallel::MpiLibraryVersion()},
          {"command", command}};
}

StatusOr<recipes::PipelineConfig> Load(const TrainOptions& options) {
  std::vector<std::string> sets = options.sets;
  if (!options.run.empty()) sets.push_back("run.dir=" + options.run);
  if (!options.resume.empty()) sets.push_back("run.resume=" + options.resume);
  if (!options.device.empty()) sets.push_back("run.device=" + options.device);
  if (!options.trace_steps.empty()) {
    SALA_ASSIGN_OR_RETURN(const std::string steps, StepList(options.trace_steps));
    sets.push_back("run.trace.steps=" + steps);
  }
  SALA_ASSIGN_OR_RETURN(recipes::PipelineConfig config,
                        recipes::LoadPipeline(options.config, sets));
  config.run.break_lock = options.break_lock;
  config.run.environment = options.environment;
  return config;
}

Status PrintConfig(const TrainOptions& options) {
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config, Load(options));
  for (const auto& [file, text] : recipes::EmitPipeline(config))
    std::printf("# %s\n%s\n", file.c_str(), text.c_str());
  return OkStatus();
}

Status TrainOn(parallel::Communicator& world, const TrainOptions& options) {
  const StatusOr<recipes::PipelineConfig> config = Load(options);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, config.status()));
  return recipes::RunPipeline(world, *config);
}

// Ends the process when the other ranks do not end with it: they wait in a collective for this one
// and would wait for ever.
// `_exit` because MPI belongs to the main thread, which is blocked; the launcher then ends the job
// with this exit code.
class EndTogether {
 public:
  explicit EndTogether(const Status& status) {
    timer_ = std::thread(
        [this, exit_code = static_cast<int>(ExitCodeOf(status)), message = MessageOf(status)] {
          std::unique_lock<std::mutex> lock(mutex_);
          if (condition_.wait_for(lock, kPatience, [this] { return together_; })) return;
          SALA_LOG(Error) << message;  // with rank and host
          _exit(exit_code);
        });
  }
  EndTogether(const EndTogether&) = delete;
  EndTogether& operator=(const EndTogether&) = delete;
  ~EndTogether() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      together_ = true;
    }
    condition_.notify_all();
    timer_.join();
  }

 private:
  // Ranks that share an error reach it within one collective of each other.
  static constexpr std::chrono::seconds kPatience{5};
  std::mutex mutex_;
  std::condition_variable condition_;
  bool together_ = false;
  std::thread timer_;
};

Status TrainAsRank(const TrainOptions& options, CommandLine& line) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::MpiSession> mpi,
                        parallel::MpiSession::Start(&line.argc, &line.argv));
  SetLogIdentity(mpi->rank(), mpi->host());
  SALA_ASSIGN_OR_RETURN(std::unique_ptr<parallel::Communicator> plain, mpi->World());
  const std::unique_ptr<parallel::Communicator> world =
      parallel::Recorded(std::move(plain), "world", parallel::ProcessCommLog());
  // A communicator of its own, so that the barrier at the end cannot meet a collective of training
  // on another rank.
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::Communicator> ending,
                        world->Split(/*colour=*/0));
  Status status = OkStatus();
  try {
    status = TrainOn(*world, options);
  } catch (const DeviceError& error) {
    status = MakeError(ExitCode::kDevice, error.code(), error.what());
  } catch (const parallel::CommError& error) {
    status = error.status();
  } catch (const std::exception& error) {
    // Unwinding further would end in MPI_Finalize, which waits for ranks that are still training.
    status = MakeError(ExitCode::kInternal, "INTERNAL", std::string("exception: ") + error.what());
  }
  if (status.ok() || mpi->size() == 1) return status;
  const EndTogether end(status);
  if (!ending->Barrier().ok()) parallel::MpiSession::Abort(static_cast<int>(ExitCodeOf(status)));
  // All ranks have it; one says it, here: behind MPI_Finalize the exit of another rank may already
  // end the job.
  if (mpi->rank() == 0) PrintError(status);
  line.print_error = false;
  return status;
}

Status Train(const TrainOptions& options, CommandLine& line) {
  recipes::InstallSignalHandlers();
  if (options.print_config) return PrintConfig(options);
  if (parallel::LaunchedByMpi()) return TrainAsRank(options, line);
  return TrainOn(
      *parallel::Recorded(parallel::MakeSelfCommunicator(), "world", parallel::ProcessCommLog()),
      options);
}

}  // namespace

void AddTrainCommand(CommandLine& line) {
  auto options = std::make_shared<TrainOptions>();
  CLI::App* command = AddCommand(
      line.app, "train", "run a pipeline or a stage; under mpirun or srun as one rank of many",
      "mpirun -np 2 sala train configs/tiny/pipeline.yaml --run runs/tiny --set "
      "stable.batch.steps=20");
  command->add_option("config", options->config, "pipeline or stage file")->required();
  command
      ->add_option("--set", options->sets,
                   "KEY.KEY=VALUE over the file; in a pipeline STAGE.KEY=VALUE")
      ->allow_extra_args(false);  // one value each, so that the file may follow
  command->add_option("--run", options->run, "run directory (run.dir)");
  command->add_option("--resume", options->resume,
                      "auto, never or a checkpoint directory (run.resume)");
  command->add_option("--device", options->device, "cpu or cuda (run.device)");
  command->add_flag("--break-lock", options->break_lock,
                    "remove the run directory's lock: the run that held it is gone for certain");
  command->add_option("--trace-steps", options->trace_steps,
                      "steps whose every layer and exchange is recorded in RUN/traces, as in "
                      "5,100-102 (run.trace.steps)");
  command->add_flag("--print-config", options->print_config, "print everything resolved and end");
  line.OnUse(command, [options, &line] {
    options->environment = Environment(line);
    return Train(*options, line);
  });
}

}  // namespace sala::launch
