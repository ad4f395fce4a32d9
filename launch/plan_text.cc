#include "launch/plan_text.h"

#include <array>
#include <cstdio>

#include "launch/command.h"

namespace sala::launch {

using recipes::MemoryPlan;
using recipes::ResidentPlan;

const std::vector<std::pair<const char*, int64_t MemoryPlan::*>>& MemoryKinds() {
  static const std::vector<std::pair<const char*, int64_t MemoryPlan::*>> kinds = {
      {"parameters", &MemoryPlan::parameters},
      {"frozen", &MemoryPlan::frozen},
      {"slots", &MemoryPlan::slots},
      {"gradients", &MemoryPlan::gradients},
      {"optimizer", &MemoryPlan::optimizer},
      {"exchange", &MemoryPlan::exchange},
      {"activations", &MemoryPlan::activations},
      {"work_space", &MemoryPlan::work_space}};
  return kinds;
}

nlohmann::ordered_json MemoryJson(const MemoryPlan& memory) {
  auto json = nlohmann::ordered_json::object();
  for (const auto& [name, kind] : MemoryKinds()) json[name] = memory.*kind;
  json["buffers"] = memory.buffers();
  json["total"] = memory.total();
  json["arena_ends"] = memory.arena_ends;
  json["assembly"] = memory.assembly;
  json["scoring"] = memory.scoring;
  json["fitting"] = memory.fitting;
  json["host"] = memory.host;
  return json;
}

nlohmann::ordered_json ResidentJson(const ResidentPlan& resident) {
  return {{"program", resident.program},     {"training", resident.training},
          {"transport", resident.transport}, {"data", resident.data},
          {"memory", resident.memory},       {"total", resident.total()}};
}

nlohmann::ordered_json MeshJson(const parallel::MeshConfig& mesh) {
  return {{"dp", mesh.dp}, {"cp", mesh.cp}, {"tp", mesh.tp}, {"zero_stage", mesh.zero_stage}};
}

void PrintMemory(const MemoryPlan& memory) {
  for (const auto& [name, kind] : MemoryKinds()) {
    const int64_t bytes = memory.*kind;
    if (bytes > 0) std::printf("    %-24s %s\n", name, ByteText(bytes).c_str());
  }
  std::printf("    %-24s %s\n", "total", ByteText(memory.total()).c_str());
  if (memory.host > 0)
    std::printf("    %-24s %s\n", "host memory beside it", ByteText(memory.host).c_str());
}

void PrintResident(const ResidentPlan& resident) {
  if (resident.total() == 0) return;
  std::printf("  peak of its process\n");
  const std::array<std::pair<const char*, int64_t>, 5> parts = {
      {{"program, measured here", resident.program},
       {"code of steps and saves", resident.training},
       {"MPI", resident.transport},
       {"documents and samples", resident.data},
       {"memory, as above", resident.memory}}};
  for (const auto& [name, bytes] : parts) {
    if (bytes > 0) std::printf("    %-24s %s\n", name, ByteText(bytes).c_str());
  }
  std::printf("    %-24s %s\n", "resident at most", ByteText(resident.total()).c_str());
}

std::string CountText(double count) {
  constexpr std::array<const char*, 4> kUnits = {"", " K", " M", " B"};
  size_t unit = 0;
  // Token totals of a trillion stay in billions: 1006.60 B beside 314.60 B.
  while (count >= 1000 && unit + 1 < kUnits.size()) {
    count /= 1000;
    ++unit;
  }
  return unit == 0 ? Format("%.0f", count) : Format("%.2f%s", count, kUnits[unit]);
}

std::string MeshText(const parallel::MeshConfig& mesh) {
  return Format("dp %lld x cp %lld x tp %lld, ZeRO %lld", static_cast<long long>(mesh.dp),
                static_cast<long long>(mesh.cp), static_cast<long long>(mesh.tp),
                static_cast<long long>(mesh.zero_stage));
}

}  // namespace sala::launch
