#include "core/memory.h"

#include <malloc.h>

#include <string>

#include "core/file.h"

namespace sala {
namespace {

// Bytes, of a line of /proc/self/status.
int64_t StatusLine(const std::string& key) {
  const auto status = ReadFile("/proc/self/status");
  if (!status.ok()) return 0;
  const size_t at = status->find(key);
  if (at == std::string::npos) return 0;
  return std::stoll(status->substr(at + key.size())) * 1024;
}

}  // namespace

int64_t ResidentPeakBytes() { return StatusLine("VmHWM:"); }
int64_t ResidentBytes() { return StatusLine("VmRSS:"); }

void ReturnFreedMemory() {
  constexpr int kFromBytes = 1 << 20;
  mallopt(M_MMAP_THRESHOLD, kFromBytes);
  // Setting one stops the library from changing both. Small blocks are taken and freed all the
  // time: the heap's end is kept for them.
  mallopt(M_TRIM_THRESHOLD, 4 * kFromBytes);
}

}  // namespace sala
