// Large pieces of the host's memory, for arenas and buffers.
#pragma once

#include <cstddef>

namespace sala {

// At least `bytes` bytes, uninitialised, aligned to 64 bytes; std::free gives them back. From 4 MiB
// on they begin on a border of 2 MiB and the system is asked for huge pages, which spares the
// processor most of its page walks: a training step on a CPU takes 7 % less time
// (docs/benchmarks/cpu_step.md). HostMemoryError when the system has none.
void* AllocateHostMemory(size_t bytes);

// Whether the system gives huge pages to who asks for them.
bool SystemGivesHugePages();

// What becomes resident when `used` of such a piece of `bytes` are written: with huge pages and of
// a large piece in steps of 2 MiB, else `used` itself.
size_t ResidentOfPiece(size_t bytes, size_t used, bool huge_pages);

}  // namespace sala
