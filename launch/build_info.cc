#include "launch/build_info.h"

#include <fstream>
#include <set>
#include <sstream>
#include <thread>

namespace sala::launch {

std::string Version() { return SALA_VERSION; }

std::string Commit() { return SALA_COMMIT; }

std::string BuildType() { return SALA_BUILD_TYPE; }

std::string CpuDescription() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  std::string model = "unknown CPU";
  std::set<std::string> flags;
  while (std::getline(file, line)) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.rfind("model name", 0) == 0) model = line.substr(colon + 2);
    if (line.rfind("flags", 0) == 0) {
      std::istringstream words(line.substr(colon + 2));
      for (std::string word; words >> word;) flags.insert(word);
      break;
    }
  }
  std::string text =
      model + ", " + std::to_string(std::thread::hardware_concurrency()) + " logical CPUs,";
  for (const char* flag : {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"}) {
    if (flags.count(flag) > 0) text += std::string(" ") + flag;
  }
  return text;
}

}  // namespace sala::launch
