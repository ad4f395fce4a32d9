#include "core/host_memory.h"

#include <sys/mman.h>

#include <cstdlib>

#include "core/exception.h"

namespace sala {

void* AllocateHostMemory(size_t bytes) {
  constexpr size_t kAlignment = 64;
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool large = bytes >= 2 * kHugePage;
  const size_t alignment = large ? kHugePage : kAlignment;
  const size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* data = nullptr;
  if (posix_memalign(&data, alignment, size) != 0) throw HostMemoryError(size);
  // Advice: a system without huge pages goes on with small ones.
  if (large) static_cast<void>(madvise(data, size, MADV_HUGEPAGE));
  return data;
}

}  // namespace sala
