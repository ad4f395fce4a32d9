// sala train: reads the configuration and runs the pipeline, alone or as one rank of an MPI job.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "launch/command.h"
#include "launch/ranks.h"
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

Status TrainOn(parallel::Communicator& world, const TrainOptions& options) {
  const StatusOr<recipes::PipelineConfig> config = Load(options);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, config.status()));
  return recipes::RunPipeline(world, *config);
}

Status Train(const TrainOptions& options, CommandLine& line) {
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
  line.OnUse(command, [options, &line] { return Train(*options, line); });
}

}  // namespace sala::launch
