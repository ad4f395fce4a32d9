// sala train: reads the configuration and runs the pipeline, alone or as one rank of an MPI job.
#include <cstdio>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "launch/build_info.h"
#include "launch/command.h"
#include "launch/plan_text.h"
#include "launch/ranks.h"
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
  bool dry_run = false;
  int ranks = 0;  // of --dry-run; 0: the fewest that the layouts can use
  bool json = false;
  bool break_lock = false;
  bool ignore_gates = false;
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
  config.run.ignore_gates = options.ignore_gates;
  config.run.environment = options.environment;
  return config;
}

Status PrintConfig(const TrainOptions& options) {
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config, Load(options));
  for (const auto& [file, text] : recipes::EmitPipeline(config))
    std::printf("# %s\n%s\n", file.c_str(), text.c_str());
  return OkStatus();
}

// One process plans for all ranks.
Status DryRun(const TrainOptions& options) {
  if (parallel::LaunchedByMpi()) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--dry-run is one process whatever the number of ranks; start it without "
                     "mpirun, with --ranks N");
  }
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config, Load(options));
  return PrintDryRun(config, options.ranks, options.json);
}

Status TrainOn(parallel::Communicator& world, const TrainOptions& options) {
  const StatusOr<recipes::PipelineConfig> config = Load(options);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, config.status()));
  return recipes::RunPipeline(world, *config);
}

Status Train(const TrainOptions& options, CommandLine& line) {
  if (options.dry_run) return DryRun(options);
  recipes::InstallSignalHandlers();
  if (options.print_config) return PrintConfig(options);
  return OnAllRanks(line,
                    [&options](parallel::Communicator& world) { return TrainOn(world, options); });
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
  command->add_flag("--ignore-gates", options->ignore_gates,
                    "go on where a gate of an evaluation does not hold (eval.gate)");
  command->add_flag("--print-config", options->print_config, "print everything resolved and end");
  CLI::Option* dry_run = command->add_flag(
      "--dry-run", options->dry_run,
      "check what can be checked, print steps, rates, operations, parameters and memory, and end");
  command->add_option("--ranks", options->ranks, "of --dry-run: ranks of the job")
      ->check(CLI::Range(1, 1 << 20))
      ->needs(dry_run);
  command->add_flag("--json", options->json, "of --dry-run: as one JSON object")->needs(dry_run);
  line.OnUse(command, [options, &line] {
    options->environment = Environment(line);
    return Train(*options, line);
  });
}

}  // namespace sala::launch
