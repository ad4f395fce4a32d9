#include "core/memory.h"

#include <string>

#include "core/file.h"

namespace sala {

int64_t ResidentPeakBytes() {
  const auto status = ReadFile("/proc/self/status");
  if (!status.ok()) return 0;
  constexpr char kKey[] = "VmHWM:";
  const size_t at = status->find(kKey);
  if (at == std::string::npos) return 0;
  return std::stoll(status->substr(at + sizeof(kKey) - 1)) * 1024;
}

}  // namespace sala
