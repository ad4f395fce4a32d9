// How plans are printed: shared by `sala plan` and `sala train --dry-run`.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "nlohmann/json.hpp"
#include "recipes/config.h"
#include "recipes/plan.h"
#include "recipes/resident_plan.h"

namespace sala::launch {

// Kinds of memory with their names, in the order they are shown.
const std::vector<std::pair<const char*, int64_t recipes::MemoryPlan::*>>& MemoryKinds();

nlohmann::ordered_json MemoryJson(const recipes::MemoryPlan& memory);
nlohmann::ordered_json ResidentJson(const recipes::ResidentPlan& resident);
nlohmann::ordered_json MeshJson(const parallel::MeshConfig& mesh);

// A line a kind, without those that are 0, then totals.
void PrintMemory(const recipes::MemoryPlan& memory);

// The peak of the process, where it is planned.
void PrintResident(const recipes::ResidentPlan& resident);

// "314.60 B", "7.80 M": decimal, as reports count tokens and parameters.
std::string CountText(double count);

// "dp 8 x cp 2 x tp 4, ZeRO 1"
std::string MeshText(const parallel::MeshConfig& mesh);

// `sala plan --gpus`.
struct LayoutRequest {
  int gpus = 0;
  std::string gpu;    // its short name
  std::string stage;  // this one only; "": all
  bool json = false;
};
// `model`: what the first stage starts from.
Status PlanLayouts(const recipes::PipelineConfig& config, const LayoutRequest& request,
                   model::ModelConfig model);

// `sala train --dry-run`; ranks 0: the fewest that the layouts can use.
Status PrintDryRun(const recipes::PipelineConfig& config, int ranks, bool json);

}  // namespace sala::launch
