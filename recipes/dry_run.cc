#include "recipes/dry_run.h"

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <utility>

#include "core/file.h"
#include "recipes/eval_stage.h"
#include "recipes/halo/distil.h"
#include "recipes/halo/items.h"
#include "recipes/halo/settings.h"
#include "recipes/halo/transfer.h"
#include "recipes/optimizer.h"
#include "recipes/schedule.h"
#include "recipes/stage.h"
#include "recipes/starting_model.h"

namespace sala::recipes {
namespace {

using model::ModelConfig;
using model::ParameterKind;
using model::ParameterSpec;

// How a phase is trained: of the stage, or of one of HALO's.
struct Recipe {
  const ScheduleConfig* schedule;
  const OptimizerConfig* optimizer;
};

Recipe RecipeOf(const StageConfig& stage, PlanPhase phase) {
  const auto of = [](const HaloPhaseConfig& halo) {
    return Recipe{&halo.schedule, &halo.optimizer};
  };
  switch (phase) {
    case PlanPhase::kAlign:
      return of(stage.halo->align);
    case PlanPhase::kDistil:
      return of(stage.halo->distil);
    case PlanPhase::kFinetune:
      return of(*stage.halo->finetune);
    case PlanPhase::kTrain:
      break;
  }
  return {&stage.schedule, &stage.optimizer};
}

bool Contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

std::string GroupName(ParameterKind kind) {
  switch (kind) {
    case ParameterKind::kMatrix:
      return "matrices";
    case ParameterKind::kVector:
      return "norms";
    case ParameterKind::kEmbedding:
      return "embedding";
    case ParameterKind::kHead:
      return "head";
  }
  return "";
}

// One group a kind of tensor, two where linear mixers have a rate of their own.
std::vector<RateGroup> RateGroups(const OptimizerConfig& optimizer, const ModelConfig& config,
                                  const std::vector<ParameterSpec>& specs,
                                  const std::function<bool(const ParameterSpec&)>& trained) {
  std::vector<RateGroup> groups;
  for (const ParameterSpec& spec : specs) {
    if (!trained(spec)) continue;
    const double multiplier = LearningRateMultiplier(optimizer, config, spec);
    ParameterSpec elsewhere;  // a tensor of this kind outside of mixers
    elsewhere.kind = spec.kind;
    const double base = LearningRateMultiplier(optimizer, config, elsewhere);
    const std::string name = (multiplier != base ? "linear mixers' " : "") + GroupName(spec.kind);
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const RateGroup& known) { return known.name == name; });
    if (group == groups.end()) {
      groups.push_back(
          {.name = name, .multiplier = multiplier, .weight_decay = WeightDecay(optimizer, spec)});
      group = groups.end() - 1;
    }
    group->parameters += spec.stored;
  }
  return groups;
}

std::vector<RatePoint> RatePoints(const ScheduleConfig& schedule, const BatchConfig& batch) {
  constexpr int64_t kParts = 11;  // first, ten between, last
  std::set<int64_t> steps;
  for (int64_t i = 0; i <= kParts; ++i) steps.insert((batch.steps - 1) * i / kParts);
  steps.insert(schedule.warmup_steps);  // the first at the full rate
  std::vector<RatePoint> points;
  points.reserve(steps.size());
  for (const int64_t step : steps) {
    points.push_back({.step = step,
                      .tokens = step * batch.global_batch_tokens,
                      .rate = LearningRate(schedule, step, batch.steps)});
  }
  return points;
}

PhaseSheet MakePhase(const ProcessStart& start, const StageConfig& stage, const NamedPlan& plan) {
  PhaseSheet sheet;
  sheet.name = plan.phase;
  sheet.input = plan.input;
  const bool align = plan.input.phase == PlanPhase::kAlign;
  const ModelConfig config = align ? AllLinear(plan.input.model) : plan.input.model;
  const std::vector<ParameterSpec> specs =
      align ? AllMixerSpecs(plan.input.model) : model::ParameterSpecs(config);
  const auto trained = [&](const ParameterSpec& spec) {
    return plan.input.phase != PlanPhase::kDistil ||
           IsTrainable(plan.input.trainable, config, spec);
  };
  const Recipe recipe = RecipeOf(stage, plan.input.phase);
  sheet.parameters = ParametersByKind(config, specs);
  sheet.groups = RateGroups(*recipe.optimizer, config, specs, trained);
  for (const ParameterCount& count : sheet.parameters) sheet.all_parameters += count.parameters;
  for (const RateGroup& group : sheet.groups) sheet.trained_parameters += group.parameters;
  sheet.points = RatePoints(*recipe.schedule, plan.input.batch);
  sheet.work = WorkOf(plan.input);
  sheet.weights = model::ProductWeightsOf(plan.input.model);
  for (const int64_t rank : {int64_t{0}, plan.input.ranks() - 1}) {
    const MemoryPlan memory = PlanMemory(plan.input, rank);
    if (memory.total() > sheet.memory.total()) sheet.memory = memory;
  }
  sheet.resident = PlanResident(start, stage, plan.input, sheet.memory);
  return sheet;
}

void AddNotes(const StageConfig& stage, StageSheet* sheet) {
  for (const PhaseSheet& phase : sheet->phases) {
    const PlanInput& input = phase.input;
    const std::string where = sheet->phases.size() > 1 ? phase.name + ": " : "";
    if (input.sparse_attention && input.batch.seq_len_tokens < input.model.sparse.dense_len) {
      sheet->notes.push_back(
          where + "sparse_attention is on, but no sample of " +
          std::to_string(input.batch.seq_len_tokens) + " tokens reaches sparse_config.dense_len " +
          std::to_string(input.model.sparse.dense_len) + ": all attention is dense");
    }
    const int64_t samples = input.batch.global_batch_sequences();
    const int64_t rounds = (samples + input.mesh.dp - 1) / input.mesh.dp;
    if (const int64_t idle = rounds * input.mesh.dp - samples; idle > 0) {
      sheet->notes.push_back(where + std::to_string(samples) + " sequences on " +
                             std::to_string(input.mesh.dp) + " dp ranks: in a step's last of " +
                             std::to_string(rounds) + " rounds " + std::to_string(idle) +
                             " of them have none");
    }
    if (input.batch.tokens > 0 && phase.tokens() != input.batch.tokens) {
      sheet->notes.push_back(where + "batch.tokens " + std::to_string(input.batch.tokens) +
                             " became " + std::to_string(input.batch.steps) + " whole steps, " +
                             std::to_string(phase.tokens()) + " tokens");
    }
  }
  if (stage.kind != StageKind::kHalo) return;
  const ModelConfig& teacher = sheet->phases[0].input.model;
  const auto plan = PlanHalo(stage, teacher);
  if (!plan.ok()) return;  // refused already
  for (std::string& warning : HaloWarnings(*stage.halo, *plan, teacher))
    sheet->notes.push_back(std::move(warning));
}

// Inputs of the configuration that do not exist, and who needs them.
class Missing {
 public:
  void Check(const std::string& what, const std::string& path, const std::string& file,
             const std::string& stage) {
    if (PathExists(file.empty() ? path : path + "/" + file)) return;
    std::string& stages = found_[{what, path}];
    if (stages.empty()) order_.emplace_back(what, path);
    stages += (stages.empty() ? "" : ", ") + stage;
  }
  std::vector<std::string> Lines() const {
    std::vector<std::string> lines;
    for (const auto& key : order_)
      lines.push_back(key.first + " " + key.second + " (" + found_.at(key) + ")");
    return lines;
  }

 private:
  std::map<std::pair<std::string, std::string>, std::string> found_;
  std::vector<std::pair<std::string, std::string>> order_;
};

bool HasDatasets(const StageConfig& stage) {
  return std::all_of(
      stage.data.mixture.begin(), stage.data.mixture.end(),
      [](const data::ViewConfig& view) { return PathExists(view.dataset + "/dataset.json"); });
}

// What the inputs that are there show.
Status CheckInputs(const StageConfig& stage, const RunConfig& run, int ranks,
                   const ModelConfig& model, const data::Tokenizer& tokenizer, bool* data_checked) {
  SALA_RETURN_IF_ERROR(CheckVocabulary(tokenizer, model));
  SALA_RETURN_IF_ERROR(CheckRecallPrompts(stage, tokenizer));
  if (stage.eval &&
      (stage.eval->haystack.empty() || PathExists(stage.eval->haystack + "/dataset.json")))
    SALA_RETURN_IF_ERROR(CheckEvalInputs(stage, tokenizer));
  *data_checked = HasDatasets(stage);
  return *data_checked ? CheckStageInputs(stage, tokenizer, run.device, ranks) : OkStatus();
}

}  // namespace

std::vector<ParameterCount> ParametersByKind(const ModelConfig& config,
                                             const std::vector<ParameterSpec>& specs) {
  // The first that fits.
  struct Kind {
    const char* name;
    std::function<bool(const ParameterSpec&)> has;
  };
  const auto softmax = [&config](const ParameterSpec& spec) {
    constexpr char kPrefix[] = "model.layers.";
    return config.mixer(std::stoll(spec.name.substr(sizeof(kPrefix) - 1))) ==
           model::MixerType::kSoftmax;
  };
  const std::vector<Kind> kinds = {
      {"embedding", [](const auto& s) { return s.kind == ParameterKind::kEmbedding; }},
      {"head", [](const auto& s) { return s.kind == ParameterKind::kHead; }},
      {"MLP", [](const auto& s) { return Contains(s.name, ".mlp."); }},
      {"norms of layers", [](const auto& s) { return !Contains(s.name, ".self_attn."); }},
      {"norms of mixers", [](const auto& s) { return s.kind == ParameterKind::kVector; }},
      {"softmax gates", [](const auto& s) { return Contains(s.name, ".o_gate."); }},
      {"linear gates", [](const auto& s) { return Contains(s.name, ".z_proj."); }},
      {"softmax q, k, v, o", softmax},
      {"linear q, k, v, o", [](const auto&) { return true; }}};
  std::vector<ParameterCount> counts;
  counts.reserve(kinds.size());
  for (const Kind& kind : kinds) counts.push_back({kind.name, 0});
  for (const ParameterSpec& spec : specs) {
    const auto kind = std::find_if(kinds.begin(), kinds.end(),
                                   [&spec](const Kind& candidate) { return candidate.has(spec); });
    counts[static_cast<size_t>(kind - kinds.begin())].parameters += spec.stored;
  }
  std::erase_if(counts, [](const ParameterCount& count) { return count.parameters == 0; });
  return counts;
}

int LeastRanks(const PipelineConfig& config) {
  int64_t ranks = 1;
  for (const StageConfig& stage : config.stages) {
    const parallel::MeshConfig& mesh = stage.parallel;
    ranks = std::lcm(ranks, std::max<int64_t>(1, mesh.dp) * mesh.cp * mesh.tp);
  }
  return static_cast<int>(ranks);
}

StatusOr<DryRunSheet> DryRun(const PipelineConfig& config, int ranks) {
  DryRunSheet sheet;
  sheet.ranks = ranks;
  const std::string& path = config.stages[0].tokenizer;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer, TokenizerIfThere(path));
  SALA_ASSIGN_OR_RETURN(
      ModelConfig model,
      StartingConfig(config.stages[0], MissingModel::kDescribe, [&path]() -> StatusOr<int64_t> {
        SALA_ASSIGN_OR_RETURN(const auto named, data::LoadTokenizer(path));
        return named->vocab_size();
      }));
  const ProcessStart start = MeasureStart(/*mpi=*/false);
  Missing missing;
  for (const StageConfig& stage : config.stages) {
    StageSheet& made = sheet.stages.emplace_back();
    made.name = stage.name;
    auto plans = PlanStage(stage, config.run, ranks, &model);
    if (!plans.ok()) return Annotate(plans.status(), "stage " + stage.name);
    if (tokenizer == nullptr) missing.Check("tokenizer", path, "", stage.name);
    if (stage.init_from) missing.Check("model", stage.init_from->path, "", stage.name);
    for (const data::ViewConfig& view : stage.data.mixture)
      missing.Check("dataset", view.dataset, "dataset.json", stage.name);
    if (stage.eval && !stage.eval->haystack.empty())
      missing.Check("dataset", stage.eval->haystack, "dataset.json", stage.name);
    if (tokenizer != nullptr) {
      const Status inputs =
          CheckInputs(stage, config.run, ranks, model, *tokenizer, &made.data_checked);
      if (!inputs.ok()) return Annotate(inputs, "stage " + stage.name);
    }
    for (NamedPlan& plan : *plans) {
      AddMachine(start, stage, &plan.input);
      made.phases.push_back(MakePhase(start, stage, plan));
    }
    AddNotes(stage, &made);
  }
  sheet.missing = missing.Lines();
  return sheet;
}

}  // namespace sala::recipes
