// Time for measuring durations.
#pragma once

#include <chrono>

namespace sala {

// Seconds of a clock that never steps back; only differences mean anything.
inline double ClockSeconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace sala
