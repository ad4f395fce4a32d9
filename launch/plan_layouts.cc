// sala plan --gpus: layouts of each stage for a number of GPUs of a kind.
#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "launch/command.h"
#include "launch/plan_text.h"
#include "nlohmann/json.hpp"
#include "recipes/layout_search.h"

namespace sala::launch {
namespace {

using recipes::Gpu;
using recipes::LayoutEstimate;
using recipes::LayoutSearch;
using recipes::PhaseEstimate;

constexpr size_t kShown = 3;
constexpr double kGiga = 1e9;

nlohmann::ordered_json ToJson(const PhaseEstimate& phase) {
  return {{"phase", phase.phase},
          {"micro_batch_sequences", phase.input.batch.micro_batch_sequences},
          {"memory", MemoryJson(phase.memory)},
          {"exchanged_bytes_per_step", phase.exchanged_bytes},
          {"step_seconds",
           {{"products", phase.time.products},
            {"attention", phase.time.attention},
            {"selection", phase.time.selection},
            {"lightning", phase.time.lightning},
            {"elementwise", phase.time.elementwise},
            {"exchange", phase.time.exchange},
            {"update", phase.time.update},
            {"all", phase.time.total()}}},
          {"tokens_per_second_per_gpu", phase.tokens_per_second},
          {"share_of_peak", phase.of_peak}};
}

nlohmann::ordered_json ToJson(const LayoutEstimate& layout, const Gpu& gpu) {
  auto phases = nlohmann::ordered_json::array();
  for (const PhaseEstimate& phase : layout.phases) phases.push_back(ToJson(phase));
  return {{"mesh", MeshJson(layout.mesh)},
          {"recompute", layout.recompute},
          {"fits", layout.Fits(gpu)},
          {"seconds", layout.seconds},
          {"phases", phases}};
}

nlohmann::ordered_json ToJson(const LayoutSearch& search, const Gpu& gpu) {
  auto best = nlohmann::ordered_json::array();
  for (const LayoutEstimate& layout : search.best) best.push_back(ToJson(layout, gpu));
  nlohmann::ordered_json written;
  if (search.written.empty()) {
    written = {{"refused", search.refused}};
  } else {
    written = ToJson(search.written[0], gpu);
  }
  return {{"meshes", search.meshes},
          {"fitting", search.fitting},
          {"as_written", written},
          {"best", best}};
}

nlohmann::ordered_json ToJson(const Gpu& gpu) {
  return {{"name", gpu.name},
          {"full_name", gpu.full_name},
          {"memory_bytes", gpu.memory_bytes},
          {"bf16_flops", gpu.bf16_flops},
          {"memory_bytes_per_second", gpu.memory_rate},
          {"link_bytes_per_second", gpu.link_rate},
          {"network_bytes_per_second", gpu.network_rate},
          {"per_host", gpu.per_host},
          {"source", gpu.source}};
}

void PrintLayout(const std::string& label, const LayoutEstimate& layout, const Gpu& gpu) {
  for (const PhaseEstimate& phase : layout.phases) {
    const parallel::MeshConfig& mesh = phase.input.mesh;
    std::printf(
        "  %-10s %-8s %5lld %4lld %4lld %4lld  %-5s %6lld %9.1f GB %9.1f GB %9.2f s %9.0f "
        "%6.1f %%%s\n",
        label.c_str(), phase.phase.c_str(), static_cast<long long>(mesh.dp),
        static_cast<long long>(mesh.cp), static_cast<long long>(mesh.tp),
        static_cast<long long>(mesh.zero_stage), layout.recompute ? "yes" : "no",
        static_cast<long long>(phase.input.batch.micro_batch_sequences),
        static_cast<double>(phase.memory.total()) / kGiga,
        static_cast<double>(phase.exchanged_bytes) / kGiga, phase.time.total(),
        phase.tokens_per_second, 100 * phase.of_peak, layout.Fits(gpu) ? "" : "  does not fit");
  }
}

// What to write into the stage's file for a layout.
void PrintYaml(const recipes::StageConfig& stage, const LayoutEstimate& layout) {
  std::printf("  %s:  parallel: {cp: %lld, tp: %lld, zero_stage: %lld}", stage.name.c_str(),
              static_cast<long long>(layout.mesh.cp), static_cast<long long>(layout.mesh.tp),
              static_cast<long long>(layout.mesh.zero_stage));
  if (!stage.halo) std::printf("  recompute: %s", layout.recompute ? "true" : "false");
  for (const PhaseEstimate& phase : layout.phases) {
    std::printf("  %sbatch.micro_batch_sequences: %lld",
                stage.halo ? ("halo." + phase.phase + ".").c_str() : "",
                static_cast<long long>(phase.input.batch.micro_batch_sequences));
  }
  std::printf("\n");
}

void PrintSearch(const recipes::StageConfig& stage, const LayoutSearch& search, const Gpu& gpu) {
  std::printf("\n%s: %lld layouts of dp, cp, tp and ZeRO, of which %lld fit\n", stage.name.c_str(),
              static_cast<long long>(search.meshes), static_cast<long long>(search.fitting));
  std::printf("  %-10s %-8s %5s %4s %4s %4s  %-5s %6s %12s %12s %11s %9s %8s\n", "", "phase", "dp",
              "cp", "tp", "ZeRO", "again", "micro", "memory", "exchanged", "step", "tokens/s",
              "of peak");
  for (size_t i = 0; i < search.best.size(); ++i)
    PrintLayout(std::to_string(i + 1), search.best[i], gpu);
  for (const LayoutEstimate& layout : search.written) PrintLayout("as written", layout, gpu);
  if (search.written.empty()) std::printf("  as written: %s\n", search.refused.c_str());
}

using ChosenLayouts = std::vector<std::pair<const recipes::StageConfig*, LayoutEstimate>>;

// How long all steps would take.
void PrintDuration(const ChosenLayouts& chosen, int gpus) {
  constexpr double kDay = 86400;
  double days = 0;
  std::printf("\nall steps with the first of each, by the model, days on %d GPUs:", gpus);
  for (const auto& [stage, layout] : chosen) {
    std::printf(" %s %.3g,", stage->name.c_str(), layout.seconds / kDay);
    days += layout.seconds / kDay;
  }
  std::printf(" together %.3g\n", days);
}

// The model behind a stage that is not asked for; only HALO changes it.
Status PassStage(const recipes::StageConfig& stage, const recipes::RunConfig& run,
                 model::ModelConfig* model) {
  if (!stage.halo) return OkStatus();
  recipes::StageConfig alone = stage;
  alone.parallel = {};
  const Status status = recipes::PlanStage(alone, run, 1, model).status();
  return Annotate(status, "stage " + stage.name);
}

}  // namespace

Status PlanLayouts(const recipes::PipelineConfig& config, const LayoutRequest& request,
                   model::ModelConfig model) {
  SALA_ASSIGN_OR_RETURN(const Gpu gpu, recipes::GpuNamed(request.gpu));
  if (!request.json) {
    std::printf(
        "%d x %s: %.0f GB, %.0f TFLOP/s dense bf16, %.2f TB/s memory, %.0f GB/s to GPUs of its "
        "host (%d a host, assumed), %.3g GB/s to other hosts (assumed)\n"
        "published peaks, not measured: %s\n"
        "Times are a model's, to compare layouts (docs/parallel.md); memory and exchanges are "
        "worked out.\n"
        "again: layers run again backward; micro: sequences of a micro-batch; memory, exchanged, "
        "tokens/s: a GPU's\n",
        request.gpus, gpu.full_name, gpu.memory_bytes / kGiga, gpu.bf16_flops / 1e12,
        gpu.memory_rate / 1e12, gpu.link_rate / kGiga, gpu.per_host, gpu.network_rate / kGiga,
        gpu.source);
  }
  auto stages = nlohmann::ordered_json::array();
  ChosenLayouts chosen;
  for (const recipes::StageConfig& stage : config.stages) {
    if (!request.stage.empty() && stage.name != request.stage) {
      SALA_RETURN_IF_ERROR(PassStage(stage, config.run, &model));
      continue;
    }
    auto search = recipes::SearchLayouts(stage, config.run, request.gpus, gpu, kShown, &model);
    if (!search.ok()) return Annotate(search.status(), "stage " + stage.name);
    if (request.json) {
      auto row = ToJson(*search, gpu);
      row["stage"] = stage.name;
      stages.push_back(std::move(row));
    } else {
      PrintSearch(stage, *search, gpu);
      chosen.emplace_back(&stage, search->best[0]);
    }
  }
  if (request.json) {
    const nlohmann::ordered_json all = {
        {"gpus", request.gpus}, {"gpu", ToJson(gpu)}, {"stages", stages}};
    std::printf("%s\n", all.dump(1).c_str());
    return OkStatus();
  }
  std::printf("\nthe first of each, for the stage's file (run.device: cuda):\n");
  for (const auto& [stage, layout] : chosen) PrintYaml(*stage, layout);
  PrintDuration(chosen, request.gpus);
  return OkStatus();
}

}  // namespace sala::launch
