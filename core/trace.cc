#include "core/trace.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "core/clock.h"
#include "core/json.h"
#include "nlohmann/json.hpp"

namespace sala {

namespace trace_internal {
std::atomic<bool> recording{false};
}  // namespace trace_internal

namespace {

constexpr std::array<std::string_view, kStepParts> kNames = {
    "other", "data", "forward", "loss", "backward", "optimizer", "save"};

struct PartClock {
  PartSeconds seconds{};
  StepPart part = StepPart::kOther;
  double since = ClockSeconds();

  // The time so far goes to the part it was spent in.
  void Settle() {
    const double now = ClockSeconds();
    seconds[static_cast<size_t>(part)] += now - since;
    since = now;
  }
};

PartClock& Clock() {
  thread_local PartClock clock;
  return clock;
}

struct Recorder {
  std::mutex mutex;
  std::vector<TraceEvent> events;
  std::map<std::thread::id, int> threads;
  double start = 0;
};

// Never destroyed: a thread beside the computation may outlive it.
Recorder& TheRecorder() {
  static auto* recorder = new Recorder;
  return *recorder;
}

}  // namespace

std::string_view NameOf(StepPart part) { return kNames[static_cast<size_t>(part)]; }

PartSeconds PartSecondsOfThisThread() {
  Clock().Settle();
  return Clock().seconds;
}

void StartTrace() {
  Recorder& recorder = TheRecorder();
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  recorder.events.clear();
  recorder.threads = {{std::this_thread::get_id(), 0}};
  recorder.start = ClockSeconds();
  trace_internal::recording = true;
}

std::vector<TraceEvent> EndTrace() {
  Recorder& recorder = TheRecorder();
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  trace_internal::recording = false;
  return std::exchange(recorder.events, {});
}

void TraceScope::Begin(std::string name, int64_t index, int64_t bytes) {
  name_ = std::move(name);
  index_ = index;
  bytes_ = bytes;
  start_ = ClockSeconds();
}

void TraceScope::End() {
  const double now = ClockSeconds();
  Recorder& recorder = TheRecorder();
  const std::lock_guard<std::mutex> lock(recorder.mutex);
  if (!Tracing() || start_ < recorder.start) return;
  const auto [thread, fresh] = recorder.threads.try_emplace(
      std::this_thread::get_id(), static_cast<int>(recorder.threads.size()));
  recorder.events.push_back({.name = std::move(name_),
                             .index = index_,
                             .bytes = bytes_,
                             .thread = thread->second,
                             .start = start_,
                             .seconds = now - start_});
}

PartScope::PartScope(StepPart part)
    : outer_(Clock().part), trace_(kNames[static_cast<size_t>(part)].data()) {
  Clock().Settle();
  Clock().part = part;
}

PartScope::~PartScope() {
  Clock().Settle();
  Clock().part = outer_;
}

std::string TraceJson(const std::vector<TraceEvent>& events, int rank, const std::string& host) {
  double first = events.empty() ? 0 : events.front().start;
  int threads = 1;
  for (const TraceEvent& event : events) {
    first = std::min(first, event.start);
    threads = std::max(threads, event.thread + 1);
  }
  auto list = nlohmann::ordered_json::array();
  const auto name = [&](const char* what, int thread, const std::string& text) {
    list.push_back(
        {{"name", what}, {"ph", "M"}, {"pid", rank}, {"tid", thread}, {"args", {{"name", text}}}});
  };
  name("process_name", 0, "rank " + std::to_string(rank) + " (" + host + ")");
  name("thread_name", 0, "computation");
  for (int thread = 1; thread < threads; ++thread)
    name("thread_name", thread, "exchanges beside the computation");
  for (const TraceEvent& event : events) {
    nlohmann::ordered_json entry = {
        {"name", event.index < 0 ? event.name : event.name + " " + std::to_string(event.index)},
        {"ph", "X"},
        {"pid", rank},
        {"tid", event.thread},
        {"ts", (event.start - first) * 1e6},
        {"dur", event.seconds * 1e6}};
    if (event.bytes >= 0) entry["args"] = {{"bytes", event.bytes}};
    list.push_back(std::move(entry));
  }
  const nlohmann::ordered_json trace = {{"displayTimeUnit", "ms"}, {"traceEvents", list}};
  return DumpJson(trace) + "\n";
}

}  // namespace sala
