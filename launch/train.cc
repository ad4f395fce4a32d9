// sala train: reads the configuration and runs the pipeline, alone or as one rank of an MPI job.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "launch/command.h"
#include "launch/ranks.h"
#include "launch/plan_text.h"
#include "parallel/communicator.h"
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
};

StatusOr<recipes::PipelineConfig> Load(const TrainOptions& options) {
  std::vector<std::string> sets = options.sets;
  if (!options.run.empty()) sets.push_back("run.dir=" + options.run);
  if (!options.resume.empty()) sets.push_back("run.resume=" + options.resume);
  if (!options.device.empty()) sets.push_back("run.device=" + options.device);
  SALA_ASSIGN_OR_RETURN(recipes::PipelineConfig config,
                        recipes::LoadPipeline(options.config, sets));
  config.run.break_lock = options.break_lock;
  config.run.ignore_gates = options.ignore_gates;
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
  line.OnUse(command, [options, &line] { return Train(*options, line); });
}

}  // namespace sala::launch
