// Runs of the program that the checks of `sala verify` start, and what such a run leaves behind:
// its metrics by step, its checkpoints by position.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "nlohmann/json.hpp"
#include "recipes/checkpointing.h"
#include "recipes/verify.h"

namespace sala::recipes {

void SaveEveryStep(PipelineConfig& config);

// Below DIRECTORY/configs/NAME, with RunDirectory as run.dir; returns the file to start.
StatusOr<std::string> WritePipeline(const VerifyContext& context, const std::string& name,
                                    PipelineConfig config);
std::string RunDirectory(const VerifyContext& context, const std::string& name);

// VERIFY-RUN (76): the run did not end as it had to.
Status Train(const VerifyContext& context, const std::string& name, const TrainStart& start,
             int expected = 0);

// The scaled pipeline from start to end on one rank, made once for all checks. Its run directory.
StatusOr<std::string> StraightRun(const VerifyContext& context, bool every_step);

using StepKey = std::tuple<int64_t, std::string, std::string>;  // global step, stage, phase
std::string StepText(const StepKey& key);

// The last line of each step in the run's metrics.
StatusOr<std::map<StepKey, nlohmann::json>> Metrics(const std::string& run);

struct SavedStep {
  std::string directory;
  StagePosition position;
  int64_t global_step = 0;
};
StatusOr<std::vector<SavedStep>> SavedSteps(const std::string& run);
// CKPT-NONE (65): there is none.
StatusOr<SavedStep> FinalOf(const std::string& run, const std::string& stage);

// A directory with all that is in it; FILE-WRITE (74).
Status CopyTree(const std::string& from, const std::string& to);
std::string BaseName(const std::string& path);

}  // namespace sala::recipes
