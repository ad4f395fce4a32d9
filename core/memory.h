// What this process uses of the host's memory, for the metrics of a run and to hold its plan
// against.
#pragma once

#include <cstdint>

namespace sala {

// Bytes asked for by all Buffers in host memory (core/buffer.h), now and the most there ever were.
int64_t HostBufferBytes();
int64_t HostBufferPeakBytes();

// The most physical memory the process had (VmHWM of Linux), libraries and their buffers included;
// 0 where the system does not say.
int64_t ResidentPeakBytes();
// Now (VmRSS); likewise 0.
int64_t ResidentBytes();

// To be called first in a program. Large blocks go back to the system when they are freed, instead
// of to the heap, where what lies behind them keeps them; the C library otherwise takes blocks of
// up to 32 MiB from the heap once the first was freed.
void ReturnFreedMemory();

}  // namespace sala
