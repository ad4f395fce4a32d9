#include "launch/plan_text.h"

#include <array>
#include <cstdio>

#include "launch/command.h"

namespace sala::launch {

using recipes::MemoryPlan;

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
  json["host"] = memory.host;
  return json;
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
