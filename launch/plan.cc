// sala plan: what a configuration will need on so many ranks, without running it.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/file.h"
#include "data/tokenizer.h"
#include "launch/command.h"
#include "launch/plan_text.h"
#include "nlohmann/json.hpp"
#include "recipes/config.h"
#include "recipes/halo/items.h"
#include "recipes/plan.h"
#include "recipes/resident_plan.h"
#include "recipes/starting_model.h"

namespace sala::launch {
namespace {

using recipes::CommPlan;
using recipes::NamedPlan;
using recipes::RankPlan;
using recipes::ResidentPlan;

// Of the process of a rank.
using Residents = std::function<ResidentPlan(const RankPlan& rank)>;

struct PlanOptions {
  std::string config;
  std::vector<std::string> sets;
  std::string stage;
  std::string run;
  std::string device;
  int ranks = 1;
  int gpus = 0;  // 0: plan what the file says
  std::string gpu;
  bool json = false;
};

// Where a new model takes its vocabulary from the tokenizer.
recipes::VocabularySize VocabularyOf(const recipes::StageConfig& stage) {
  return [&stage]() -> StatusOr<int64_t> {
    SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                          data::LoadTokenizer(stage.tokenizer));
    return tokenizer->vocab_size();
  };
}

nlohmann::ordered_json ToJson(const RankPlan& rank, const ResidentPlan& resident) {
  auto comm = nlohmann::ordered_json::object();
  for (const auto& [name, count] : rank.comm)
    comm[name] = {{"calls", count.calls}, {"bytes", count.bytes}};
  return {
      {"comm", comm}, {"memory", MemoryJson(rank.memory)}, {"resident", ResidentJson(resident)}};
}

nlohmann::ordered_json ToJson(const NamedPlan& plan, const std::vector<RankPlan>& ranks,
                              const Residents& residents) {
  const recipes::PlanInput& input = plan.input;
  auto all = nlohmann::ordered_json::array();
  for (const RankPlan& rank : ranks) all.push_back(ToJson(rank, residents(rank)));
  return {{"phase", plan.phase},
          {"mesh", MeshJson(input.mesh)},
          {"steps", input.batch.steps},
          {"tokens_per_step", input.batch.global_batch_tokens},
          {"parameters", recipes::TrainedParameters(input)},
          {"flop_per_step", recipes::StepFlop(input)},
          {"ranks", all}};
}

void PrintTable(const std::string& stage, const NamedPlan& plan, const std::vector<RankPlan>& ranks,
                const Residents& residents) {
  const recipes::PlanInput& input = plan.input;
  const auto largest = std::max_element(
      ranks.begin(), ranks.end(),
      [](const RankPlan& a, const RankPlan& b) { return a.memory.total() < b.memory.total(); });
  std::printf("\n%s / %s: %s, %s\n", stage.c_str(), plan.phase.c_str(),
              MeshText(input.mesh).c_str(), input.device == DeviceKind::kCuda ? "cuda" : "cpu");
  std::printf("  %-26s %s\n", "steps", WithCommas(input.batch.steps).c_str());
  std::printf("  %-26s %s\n", "tokens per step",
              WithCommas(input.batch.global_batch_tokens).c_str());
  std::printf("  %-26s %s\n", "trained parameters",
              WithCommas(recipes::TrainedParameters(input)).c_str());
  std::printf("  %-26s %.3e\n", "floating-point operations", recipes::StepFlop(input));
  std::printf("  memory of rank %lld, the largest\n",
              static_cast<long long>(largest - ranks.begin()));
  PrintMemory(largest->memory);
  PrintResident(residents(*largest));
  CommPlan most;
  for (const RankPlan& rank : ranks) {
    for (const auto& [name, count] : rank.comm) {
      recipes::CommCount& to = most[name];
      to.calls = std::max(to.calls, count.calls);
      to.bytes = std::max(to.bytes, count.bytes);
    }
  }
  std::printf("  exchanged in a step, the most of a rank\n");
  for (const auto& [name, count] : most) {
    std::printf("    %-24s %12s calls  %s\n", name.c_str(), WithCommas(count.calls).c_str(),
                ByteText(count.bytes).c_str());
  }
}

Status Plan(const PlanOptions& options) {
  std::vector<std::string> sets = options.sets;
  if (!options.run.empty()) sets.push_back("run.dir=" + options.run);
  if (!options.device.empty()) sets.push_back("run.device=" + options.device);
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config,
                        recipes::LoadPipeline(options.config, sets));
  const auto named = [&](const recipes::StageConfig& stage) { return stage.name == options.stage; };
  if (!options.stage.empty() && std::none_of(config.stages.begin(), config.stages.end(), named)) {
    std::string names;
    for (const recipes::StageConfig& stage : config.stages)
      names += (names.empty() ? "" : ", ") + stage.name;
    return MakeError(
        ExitCode::kUsage, "USAGE",
        "--stage: found '" + Printable(options.stage) + "', " + options.config + " has " + names);
  }
  SALA_ASSIGN_OR_RETURN(model::ModelConfig model,
                        recipes::StartingConfig(config.stages[0], recipes::MissingModel::kDescribe,
                                                VocabularyOf(config.stages[0])));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        recipes::TokenizerIfThere(config.stages[0].tokenizer));
  const recipes::ProcessStart start = recipes::MeasureStart(/*mpi=*/false);
  for (const recipes::StageConfig& stage : config.stages) {
    if (tokenizer == nullptr) break;
    const Status prompts = recipes::CheckRecallPrompts(stage, *tokenizer);
    if (!prompts.ok()) return Annotate(prompts, "stage " + stage.name);
  }
  if (options.gpus > 0) {
    return PlanLayouts(config, {options.gpus, options.gpu, options.stage, options.json},
                       std::move(model));
  }
  auto stages = nlohmann::ordered_json::array();
  for (const recipes::StageConfig& stage : config.stages) {
    auto plans = recipes::PlanStage(stage, config.run, options.ranks, &model);
    if (!plans.ok()) return Annotate(plans.status(), "stage " + stage.name);
    if (!options.stage.empty() && !named(stage)) continue;
    auto phases = nlohmann::ordered_json::array();
    for (NamedPlan& plan : *plans) {
      recipes::AddMachine(start, stage, &plan.input);
      std::vector<RankPlan> ranks;
      ranks.reserve(static_cast<size_t>(options.ranks));
      for (int rank = 0; rank < options.ranks; ++rank) {
        ranks.push_back(
            recipes::PlanRank(plan.input, rank, recipes::FullMicroBatches(plan.input, rank)));
      }
      const Residents residents = [&](const RankPlan& rank) {
        return recipes::PlanResident(start, stage, plan.input, rank.memory);
      };
      if (options.json) {
        phases.push_back(ToJson(plan, ranks, residents));
      } else {
        PrintTable(stage.name, plan, ranks, residents);
      }
    }
    stages.push_back({{"stage", stage.name}, {"phases", phases}});
  }
  if (options.json) {
    const nlohmann::ordered_json all = {{"ranks", options.ranks}, {"stages", stages}};
    std::printf("%s\n", all.dump(1).c_str());
  }
  return OkStatus();
}

}  // namespace

void AddPlanCommand(CommandLine& line) {
  auto options = std::make_shared<PlanOptions>();
  CLI::App* command = AddCommand(
      line.app, "plan", "memory, exchanges and work of a step on so many ranks, without running it",
      "sala plan configs/tiny/pipeline.yaml --ranks 8 --set "
      "stable.parallel.zero_stage=3 --stage stable");
  command->add_option("config", options->config, "pipeline or stage file")->required();
  command->add_option("--ranks", options->ranks, "ranks of the job")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--set", options->sets,
                   "KEY.KEY=VALUE over the file; in a pipeline STAGE.KEY=VALUE")
      ->allow_extra_args(false);  // one value each, so that the file may follow
  command->add_option("--stage", options->stage, "this stage only");
  command->add_option("--run", options->run, "run directory (run.dir); nothing is written there");
  command->add_option("--device", options->device, "cpu or cuda (run.device)");
  CLI::Option* gpu = command->add_option(
      "--gpu", options->gpu, "of --gpus: h200, h100, a100, ...; a wrong name lists them all");
  CLI::Option* gpus =
      command
          ->add_option("--gpus", options->gpus,
                       "propose layouts for so many GPUs instead, by a model of their speed")
          ->check(CLI::Range(1, 1 << 16))
          ->needs(gpu)
          ->excludes("--ranks")
          ->excludes("--device");
  gpu->needs(gpus);
  command->add_flag("--json", options->json, "everything, every rank, as one JSON object");
  line.OnUse(command, [options] { return Plan(*options); });
}

}  // namespace sala::launch
