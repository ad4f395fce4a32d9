#include "recipes/verify_run.h"

#include <filesystem>
#include <sstream>
#include <system_error>
#include <utility>

#include "core/checkpoint.h"
#include "core/file.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

Status RunError(const std::string& name, const TrainRun& run, int expected) {
  return MakeError(ExitCode::kNumbers, "VERIFY-RUN",
                   "run " + name + " ended with exit code " + std::to_string(run.exit_code) +
                       ", expected " + std::to_string(expected) +
                       (run.error.empty() ? "" : ": " + run.error));
}

}  // namespace

void SaveEveryStep(PipelineConfig& config) {
  for (StageConfig& stage : config.stages) {
    stage.checkpoint.every_steps = 1;
    stage.checkpoint.keep_last = 1000;
  }
}

StatusOr<std::string> WritePipeline(const VerifyContext& context, const std::string& name,
                                    PipelineConfig config) {
  const std::string folder = context.directory + "/configs/" + name;
  config.run.dir = context.directory + "/runs/" + name;
  SALA_RETURN_IF_ERROR(MakeDirectories(folder + "/stages"));
  for (const auto& [file, text] : EmitPipeline(config))
    SALA_RETURN_IF_ERROR(WriteFileAtomically(folder + "/" + file, text));
  return folder + "/config.yaml";
}

std::string RunDirectory(const VerifyContext& context, const std::string& name) {
  return context.directory + "/runs/" + name;
}

Status Train(const VerifyContext& context, const std::string& name, const TrainStart& start,
             int expected) {
  context.progress(
      "run " + name +
      (start.ranks > 1 ? " on " + std::to_string(start.ranks) + " ranks" : std::string()));
  SALA_ASSIGN_OR_RETURN(const TrainRun run, context.train(start));
  return run.exit_code == expected ? OkStatus() : RunError(name, run, expected);
}

StatusOr<std::string> StraightRun(const VerifyContext& context, bool every_step) {
  const std::string name = every_step ? "straight-saving-every-step" : "straight";
  const std::string run = RunDirectory(context, name);
  const auto status = ReadFile(run + "/status.json");
  if (status.ok() && json::parse(*status, nullptr, false).value("state", "") == "done") return run;
  PipelineConfig config = context.scaled->config;
  if (every_step) SaveEveryStep(config);
  SALA_ASSIGN_OR_RETURN(const std::string file, WritePipeline(context, name, config));
  SALA_RETURN_IF_ERROR(Train(context, name, {.config = file, .run = run}));
  return run;
}

std::string StepText(const StepKey& key) {
  return "step " + std::to_string(std::get<0>(key)) + " (stage " + std::get<1>(key) + ", " +
         std::get<2>(key) + ")";
}

StatusOr<std::map<StepKey, json>> Metrics(const std::string& run) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(run + "/metrics/train.jsonl"));
  std::map<StepKey, json> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    json object = json::parse(line, nullptr, false);
    if (!object.is_object() || !object.contains("stage")) continue;
    const StepKey key = {object.value("step", int64_t{0}), object.value("stage", ""),
                         object.value("phase", "")};
    lines[key] = std::move(object);
  }
  return lines;
}

StatusOr<std::vector<SavedStep>> SavedSteps(const std::string& run) {
  std::vector<SavedStep> steps;
  for (const CheckpointListing& entry : ListCheckpoints(run + "/checkpoints")) {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(entry.directory));
    steps.push_back({entry.directory, PositionOf(checkpoint), checkpoint.info().global_step});
  }
  return steps;
}

StatusOr<SavedStep> FinalOf(const std::string& run, const std::string& stage) {
  SALA_ASSIGN_OR_RETURN(const std::vector<SavedStep> steps, SavedSteps(run));
  for (const SavedStep& step : steps) {
    if (step.position.stage_final && step.position.stage == stage) return step;
  }
  return MakeError(ExitCode::kData, "CKPT-NONE",
                   run + ": no checkpoint of the end of stage " + stage);
}

Status CopyTree(const std::string& from, const std::string& to) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(to).parent_path(), error);
  std::filesystem::copy(from, to, std::filesystem::copy_options::recursive, error);
  if (!error) return OkStatus();
  return MakeError(ExitCode::kIo, "FILE-WRITE",
                   to + ": copying from " + from + " failed: " + error.message());
}

std::string BaseName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

}  // namespace sala::recipes
