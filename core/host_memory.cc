#include "core/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>

#include "core/exception.h"

namespace sala {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = 2 * kHugePage;

}  // namespace

void* AllocateHostMemory(size_t bytes) {
  constexpr size_t kAlignment = 64;
  const bool large = bytes >= kLarge;
  const size_t alignment = large ? kHugePage : kAlignment;
  const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* data = nullptr;
  if (posix_memalign(&data, alignment, size) != 0) throw HostMemoryError(size);
  // Advice: a system without huge pages goes on with small ones.
  if (large) static_cast<void>(madvise(data, size, MADV_HUGEPAGE));
  return data;
}

// "always [madvise] never": the setting is the word in brackets.
bool SystemGivesHugePages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string words;
  std::getline(file, words);
  return words.find("[always]") != std::string::npos ||
         words.find("[madvise]") != std::string::npos;
}

size_t ResidentOfPiece(size_t bytes, size_t used, bool huge_pages) {
  if (!huge_pages || bytes < kLarge) return used;
  return std::min(bytes, (used + kHugePage - 1) / kHugePage * kHugePage);
}

}  // namespace sala
