// Where the time of a step goes: seconds by part of the step, always, and, while a trace is
// recorded, what each thread did when.
//
//   const PartScope part(StepPart::kForward);            // a few of them a step
//   const TraceScope layer("layer", l);                  // as many as one likes
//
// Both end with their C++ scope and nest. A TraceScope costs one branch while nothing is recorded.
// Times are the host's: on a GPU they say when work was queued, and the wait for it falls where a
// number is read. Neither changes a bit of what is computed.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sala {

enum class StepPart : uint8_t { kOther, kData, kForward, kLoss, kBackward, kOptimizer, kSave };
constexpr size_t kStepParts = 7;
std::string_view NameOf(StepPart part);  // "other", "data", "forward", ...

// Seconds of the calling thread since it started, by StepPart. Of scopes inside each other the
// inner one counts, so that the parts add up to the whole.
using PartSeconds = std::array<double, kStepParts>;
PartSeconds PartSecondsOfThisThread();

// One stretch of time of one thread.
struct TraceEvent {
  std::string name;
  int64_t index = -1;  // of a layer or a micro-batch; -1: none
  int64_t bytes = -1;  // of an exchange; -1: none
  int thread = 0;      // 0 is the thread that started the trace, others by their first event
  double start = 0;    // ClockSeconds()
  double seconds = 0;
};

// What is under way when a trace starts or ends is not part of it. One trace at a time.
void StartTrace();
std::vector<TraceEvent> EndTrace();  // in the order in which they ended

namespace trace_internal {
extern std::atomic<bool> recording;
}  // namespace trace_internal

inline bool Tracing() { return trace_internal::recording.load(std::memory_order_relaxed); }

class TraceScope {
 public:
  explicit TraceScope(const char* name, int64_t index = -1) {
    if (Tracing()) Begin(name, index);
  }
  // Its name has to be made first, by those who ask Tracing() before.
  TraceScope() = default;
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;
  ~TraceScope() {
    if (start_ >= 0) End();
  }
  void Begin(std::string name, int64_t index = -1, int64_t bytes = -1);

 private:
  void End();

  std::string name_;
  int64_t index_ = -1;
  int64_t bytes_ = -1;
  double start_ = -1;  // below 0: not recorded
};

class PartScope {
 public:
  explicit PartScope(StepPart part);
  PartScope(const PartScope&) = delete;
  PartScope& operator=(const PartScope&) = delete;
  ~PartScope();

 private:
  StepPart outer_;
  TraceScope trace_;
};

// The trace as JSON of the Trace Event Format, which chrome://tracing and Perfetto read: complete
// events, microseconds since the first start, process `rank`, named threads.
std::string TraceJson(const std::vector<TraceEvent>& events, int rank, const std::string& host);

}  // namespace sala
