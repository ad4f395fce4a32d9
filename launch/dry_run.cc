// sala train --dry-run: what a run would do, from its configuration alone.
#include <algorithm>
#include <cstdio>
#include <string>

#include "launch/command.h"
#include "launch/plan_text.h"
#include "nlohmann/json.hpp"
#include "recipes/dry_run.h"

namespace sala::launch {
namespace {

using recipes::DryRunSheet;
using recipes::PhaseSheet;
using recipes::StageSheet;

constexpr double kGiga = 1e9;

// Of all passes of the phase; its work is that of full samples.
double TrainingPerToken(const PhaseSheet& phase) {
  return phase.work.step.forward() / static_cast<double>(phase.input.batch.global_batch_tokens);
}

nlohmann::ordered_json ToJson(const model::ForwardWork& work, double tokens) {
  return {{"products", work.products / tokens},
          {"attention", work.attention / tokens},
          {"selection", work.selection / tokens},
          {"lightning", work.lightning / tokens},
          {"all", work.forward() / tokens}};
}

nlohmann::ordered_json ToJson(const PhaseSheet& phase) {
  const recipes::BatchConfig& batch = phase.input.batch;
  auto parameters = nlohmann::ordered_json::object();
  for (const auto& [kind, count] : phase.parameters) parameters[kind] = count;
  parameters["all"] = phase.all_parameters;
  parameters["trained"] = phase.trained_parameters;
  auto groups = nlohmann::ordered_json::array();
  for (const auto& group : phase.groups) {
    groups.push_back({{"name", group.name},
                      {"parameters", group.parameters},
                      {"multiplier", group.multiplier},
                      {"weight_decay", group.weight_decay}});
  }
  auto points = nlohmann::ordered_json::array();
  for (const auto& point : phase.points)
    points.push_back({{"step", point.step}, {"tokens", point.tokens}, {"rate", point.rate}});
  return {{"phase", phase.name},
          {"mesh", MeshJson(phase.input.mesh)},
          {"seq_len_tokens", batch.seq_len_tokens},
          {"global_batch_sequences", batch.global_batch_sequences()},
          {"global_batch_tokens", batch.global_batch_tokens},
          {"steps", batch.steps},
          {"tokens", phase.tokens()},
          {"tokens_asked", batch.tokens},
          {"parameters", parameters},
          {"rate_groups", groups},
          {"rates", points},
          {"flop_per_token",
           {{"forward", ToJson(phase.work.forward, static_cast<double>(batch.seq_len_tokens))},
            {"forward_products_of",
             {{"softmax_layers", 2 * phase.weights.softmax},
              {"linear_layers", 2 * phase.weights.linear},
              {"mlp", 2 * phase.weights.mlp},
              {"head", 2 * phase.weights.head}}},
            {"training", ToJson(phase.work.step, static_cast<double>(batch.global_batch_tokens))}}},
          {"memory", MemoryJson(phase.memory)},
          {"resident", ResidentJson(phase.resident)}};
}

nlohmann::ordered_json ToJson(const DryRunSheet& sheet) {
  auto stages = nlohmann::ordered_json::array();
  for (const StageSheet& stage : sheet.stages) {
    auto phases = nlohmann::ordered_json::array();
    for (const PhaseSheet& phase : stage.phases) phases.push_back(ToJson(phase));
    stages.push_back({{"stage", stage.name},
                      {"data_checked", stage.data_checked},
                      {"notes", stage.notes},
                      {"phases", phases}});
  }
  return {{"ranks", sheet.ranks}, {"missing", sheet.missing}, {"stages", stages}};
}

void PrintRates(const PhaseSheet& phase) {
  std::printf("  %-14s %18s", "rate at step", "tokens before");
  for (const auto& group : phase.groups) std::printf("  %22s", group.name.c_str());
  std::printf("\n");
  for (const auto& point : phase.points) {
    std::printf("  %-14s %18s", WithCommas(point.step).c_str(), WithCommas(point.tokens).c_str());
    for (const auto& group : phase.groups) std::printf("  %22.4g", group.multiplier * point.rate);
    std::printf("\n");
  }
  std::printf("  %-14s %18s", "multiplier", "");
  for (const auto& group : phase.groups) std::printf("  %22.4g", group.multiplier);
  std::printf("\n  %-14s %18s", "weight decay", "");
  for (const auto& group : phase.groups) std::printf("  %22.4g", group.weight_decay);
  std::printf("\n");
}

void PrintWork(const PhaseSheet& phase) {
  const auto tokens = static_cast<double>(phase.input.batch.seq_len_tokens);
  const model::ForwardWork& work = phase.work.forward;
  // The alignment's mixers have no forward pass of a whole model.
  const char* of = phase.input.phase == recipes::PlanPhase::kAlign ? " of the teacher" : "";
  std::printf(
      "  GFLOP a token  forward%s %.3f: products %.3f, attention %.3f, selection %.3f, "
      "Lightning %.3f; training %.3f\n",
      of, work.forward() / tokens / kGiga, work.products / tokens / kGiga,
      work.attention / tokens / kGiga, work.selection / tokens / kGiga,
      work.lightning / tokens / kGiga, TrainingPerToken(phase) / kGiga);
  std::printf(
      "                 products of softmax layers %.3f, linear layers %.3f, MLP %.3f, head "
      "%.3f\n",
      2 * phase.weights.softmax / kGiga, 2 * phase.weights.linear / kGiga,
      2 * phase.weights.mlp / kGiga, 2 * phase.weights.head / kGiga);
}

void PrintPhase(const StageSheet& stage, const PhaseSheet& phase) {
  const recipes::BatchConfig& batch = phase.input.batch;
  std::printf("\n%s / %s: %s, %s\n", stage.name.c_str(), phase.name.c_str(),
              MeshText(phase.input.mesh).c_str(),
              phase.input.device == DeviceKind::kCuda ? "cuda" : "cpu");
  std::printf("  %s steps of %s x %s = %s tokens: %s tokens (%s)%s\n",
              WithCommas(batch.steps).c_str(), WithCommas(batch.global_batch_sequences()).c_str(),
              WithCommas(batch.seq_len_tokens).c_str(),
              WithCommas(batch.global_batch_tokens).c_str(), WithCommas(phase.tokens()).c_str(),
              CountText(static_cast<double>(phase.tokens())).c_str(),
              phase.input.sparse_attention ? ", sparse attention on" : "");
  PrintRates(phase);
  PrintWork(phase);
  std::printf("  parameters %s, trained %s\n", WithCommas(phase.all_parameters).c_str(),
              WithCommas(phase.trained_parameters).c_str());
  for (const auto& [kind, count] : phase.parameters)
    std::printf("    %-24s %s\n", kind.c_str(), WithCommas(count).c_str());
  std::printf("  memory of a rank\n");
  PrintMemory(phase.memory);
  PrintResident(phase.resident);
}

void PrintTotals(const DryRunSheet& sheet) {
  std::printf("\n%-24s %10s %22s %16s %14s\n", "stage / phase", "steps", "tokens", "FLOP",
              "memory a rank");
  int64_t steps = 0;
  int64_t tokens = 0;
  double flop = 0;
  int64_t most = 0;
  for (const StageSheet& stage : sheet.stages) {
    for (const PhaseSheet& phase : stage.phases) {
      const double work = phase.work.step.forward() * static_cast<double>(phase.input.batch.steps);
      std::printf("%-24s %10s %22s %16.4g %14s\n", (stage.name + " / " + phase.name).c_str(),
                  WithCommas(phase.input.batch.steps).c_str(), WithCommas(phase.tokens()).c_str(),
                  work, ByteText(phase.memory.total()).c_str());
      steps += phase.input.batch.steps;
      tokens += phase.tokens();
      flop += work;
      most = std::max(most, phase.memory.total());
    }
  }
  std::printf("%-24s %10s %22s %16.4g %14s\n", "all", WithCommas(steps).c_str(),
              WithCommas(tokens).c_str(), flop, ByteText(most).c_str());
}

void PrintRest(const DryRunSheet& sheet) {
  for (const StageSheet& stage : sheet.stages) {
    for (const std::string& note : stage.notes)
      std::printf("note: %s: %s\n", stage.name.c_str(), note.c_str());
  }
  if (sheet.missing.empty()) {
    std::printf("\nall inputs are there\n");
    return;
  }
  std::printf("\nnot there yet, needed to train; what they would show is not checked:\n");
  for (const std::string& line : sheet.missing) std::printf("  %s\n", line.c_str());
}

}  // namespace

Status PrintDryRun(const recipes::PipelineConfig& config, int ranks, bool json) {
  if (ranks == 0) ranks = recipes::LeastRanks(config);
  SALA_ASSIGN_OR_RETURN(const DryRunSheet sheet, recipes::DryRun(config, ranks));
  if (json) {
    std::printf("%s\n", ToJson(sheet).dump(1).c_str());
    return OkStatus();
  }
  std::printf("%s on %lld ranks: nothing is trained or written\n", config.name.c_str(),
              static_cast<long long>(sheet.ranks));
  for (const StageSheet& stage : sheet.stages) {
    for (const PhaseSheet& phase : stage.phases) PrintPhase(stage, phase);
  }
  PrintTotals(sheet);
  PrintRest(sheet);
  return OkStatus();
}

}  // namespace sala::launch
