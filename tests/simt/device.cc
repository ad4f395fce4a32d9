#include "tests/simt/device.h"

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <vector>

#include "tests/simt/fiber.h"
#include "tests/simt/sanitizer.h"
#include "tests/simt/simt_core.h"

namespace {

using simt::sanitizer::Tag;

struct Item {
  uint64_t number;  // over all streams, in the order of the calls
  simt::device::Work work;
  Tag put;  // released by the host that put it
};

constexpr size_t kStreamStackBytes = size_t{4} << 20;

}  // namespace

// The type that the CUDA headers leave open.
struct CUstream_st {
  bool blocking = true;
  std::deque<std::unique_ptr<Item>> queue;
  bool running = false;
  uint64_t running_number = 0;
  Tag done{};  // released after each item

  // For ThreadSanitizer only: the stream as a thread, with a stack of its own, since the host's
  // stack belongs to the host.
  void* tsan = simt::sanitizer::CreateFiber();
  std::unique_ptr<simt::Stacks> stack;
  simt::Context context;
  simt::Context caller;
  void* caller_tsan = nullptr;
  std::unique_ptr<Item> item;  // being run
};

namespace simt::device {

class Event {
 public:
  cudaStream_t stream = nullptr;
  uint64_t number = 0;  // of the item that records it; 0: never recorded
  int64_t passed_at = 0;
  Tag passed{};
};

namespace {

// Of the queues; never held while work runs. Neither on the heap nor behind a guard, which
// ThreadSanitizer would not see here.
constinit std::mutex queue_mutex;
constinit std::mutex error_mutex;
std::condition_variable queue_changed;

struct Device {
  uint64_t last_number = 0;
  CUstream_st null_stream;
  std::set<cudaStream_t> streams;  // without the default one

  cudaError_t sticky = cudaSuccess;
  std::map<std::string, int> counts;
  std::map<std::string, std::set<std::string>> failures;  // kind -> numbers or names
};

void ParseFailures(Device& device, const std::string& list) {
  device.failures.clear();
  device.counts.clear();
  std::istringstream items(list);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t colon = item.find(':');
    if (colon == std::string::npos) Report("SALA_SIMT_FAIL: \"" + item + "\" has no colon");
    device.failures[item.substr(0, colon)].insert(item.substr(colon + 1));
  }
}

Device& TheDevice() {
  static Device* device = [] {
    auto* fresh = new Device;  // never destroyed: static objects elsewhere may still use it
    if (const char* list = std::getenv("SALA_SIMT_FAIL")) ParseFailures(*fresh, list);
    return fresh;
  }();
  return *device;
}

thread_local cudaError_t last_error = cudaSuccess;

CUstream_st& Real(cudaStream_t stream) {
  Device& device = TheDevice();
  // Also the two special handles of the runtime, which mean the default stream here.
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) {
    return device.null_stream;
  }
  return *stream;
}

void RunThrough(CUstream_st& stream, uint64_t number);

// What an item of `stream` must come after by the rules of the default stream.
void RunDefaultStreamOrder(CUstream_st& stream, uint64_t number) {
  Device& device = TheDevice();
  if (&stream != &device.null_stream) {
    if (stream.blocking) RunThrough(device.null_stream, number);
    return;
  }
  std::vector<cudaStream_t> before;
  {
    const std::lock_guard<std::mutex> lock(queue_mutex);
    for (cudaStream_t other : device.streams) {
      if (other->blocking) before.push_back(other);
    }
  }
  for (cudaStream_t other : before) {
    RunThrough(*other, number);
    sanitizer::Acquire(&other->done);
  }
}

// The item is destroyed here too: to ThreadSanitizer nobody else comes after its use.
void RunItem(CUstream_st& stream) {
  RunDefaultStreamOrder(stream, stream.item->number - 1);
  if (stream.blocking) sanitizer::Acquire(&TheDevice().null_stream.done);
  sanitizer::Acquire(&stream.item->put);
  stream.item->work();
  stream.item.reset();
  sanitizer::Release(&stream.done);
}

constinit thread_local CUstream_st* entering = nullptr;

void StreamMain() {
  CUstream_st& stream = *entering;
  RunItem(stream);
  __tsan_switch_to_fiber(stream.caller_tsan, 1);
  Switch(&stream.context, &stream.caller);
}

void RunItemAsStream(CUstream_st& stream) {
  if (!sanitizer::HasThread()) return RunItem(stream);
  if (stream.stack == nullptr) stream.stack = std::make_unique<Stacks>(1, kStreamStackBytes);
  stream.stack->Start(&stream.context, 0, &StreamMain);
  stream.caller_tsan = sanitizer::CurrentFiber();
  entering = &stream;
  __tsan_switch_to_fiber(stream.tsan, 1);
  Switch(&stream.caller, &stream.context);
}

// Runs the items of the stream up to this number, in order.
void RunThrough(CUstream_st& stream, uint64_t number) {
  std::unique_lock<std::mutex> lock(queue_mutex);
  for (;;) {
    const bool waiting = !stream.queue.empty() && stream.queue.front()->number <= number;
    const bool running = stream.running && stream.running_number <= number;
    if (!waiting && !running) return;
    if (stream.running) {  // by another host thread
      queue_changed.wait(lock);
      continue;
    }
    stream.item = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.running = true;
    stream.running_number = stream.item->number;
    lock.unlock();
    RunItemAsStream(stream);
    lock.lock();
    stream.running = false;
    queue_changed.notify_all();
  }
}

uint64_t Put(CUstream_st& stream, Work work) {
  Device& device = TheDevice();
  uint64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(queue_mutex);
    number = ++device.last_number;
    auto item = std::make_unique<Item>();
    item->number = number;
    item->work = std::move(work);
    sanitizer::Release(&item->put);
    stream.queue.push_back(std::move(item));
  }
  if (options().eager) RunThrough(stream, number);
  return number;
}

int64_t Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

void Enqueue(cudaStream_t stream, Work work) { Put(Real(stream), std::move(work)); }

void Synchronize(cudaStream_t stream) {
  CUstream_st& real = Real(stream);
  RunThrough(real, ~uint64_t{0});
  if (&real == &TheDevice().null_stream) RunDefaultStreamOrder(real, ~uint64_t{0});
  sanitizer::Acquire(&real.done);
}

void SynchronizeAll() {
  Device& device = TheDevice();
  std::set<cudaStream_t> streams;
  {
    const std::lock_guard<std::mutex> lock(queue_mutex);
    streams = device.streams;
  }
  for (cudaStream_t stream : streams) Synchronize(stream);
  Synchronize(cudaStream_t{nullptr});
}

cudaStream_t CreateStream(bool blocking) {
  Device& device = TheDevice();
  auto* stream = new CUstream_st;
  stream->blocking = blocking;
  const std::lock_guard<std::mutex> lock(queue_mutex);
  device.streams.insert(stream);
  return stream;
}

void DestroyStream(cudaStream_t stream) {
  Device& device = TheDevice();
  RunThrough(*stream, ~uint64_t{0});
  {
    const std::lock_guard<std::mutex> lock(queue_mutex);
    device.streams.erase(stream);
  }
  sanitizer::DestroyFiber(stream->tsan);
  delete stream;
}

bool StreamExists(cudaStream_t stream) {
  Device& device = TheDevice();
  if (&Real(stream) == &device.null_stream) return true;
  const std::lock_guard<std::mutex> lock(queue_mutex);
  return device.streams.count(stream) != 0;
}

std::shared_ptr<Event> CreateEvent() { return std::make_shared<Event>(); }

void Record(const std::shared_ptr<Event>& event, cudaStream_t stream) {
  event->stream = stream;
  event->number = Put(Real(stream), [event] {
    event->passed_at = Now();
    sanitizer::Release(&event->passed);
  });
}

void StreamWait(cudaStream_t stream, const std::shared_ptr<Event>& event) {
  if (event->number == 0) return;
  Put(Real(stream), [event, source = event->stream, number = event->number] {
    if (StreamExists(source)) RunThrough(Real(source), number);
    sanitizer::Acquire(&event->passed);
  });
}

void Synchronize(const std::shared_ptr<Event>& event) {
  if (event->number == 0) return;
  if (StreamExists(event->stream)) RunThrough(Real(event->stream), event->number);
  sanitizer::Acquire(&event->passed);
}

bool WasRecorded(const Event& event) { return event.number != 0; }
int64_t PassedAt(const Event& event) { return event.passed_at; }

bool FailsNow(const std::string& kind) {
  Device& device = TheDevice();
  const std::lock_guard<std::mutex> lock(error_mutex);
  const auto found = device.failures.find(kind);
  if (found == device.failures.end()) return false;
  return found->second.count(std::to_string(++device.counts[kind])) != 0;
}

cudaError_t LaunchFailure(const std::string& kernel) {
  Device& device = TheDevice();
  if (device.sticky != cudaSuccess) return Fail(device.sticky);
  const std::lock_guard<std::mutex> lock(error_mutex);
  const auto found = device.failures.find("launch");
  if (found == device.failures.end() || found->second.count(kernel) == 0) return cudaSuccess;
  return last_error = cudaErrorLaunchOutOfResources;
}

void SetFailures(const std::string& list) {
  Device& device = TheDevice();
  const std::lock_guard<std::mutex> lock(error_mutex);
  ParseFailures(device, list);
  device.sticky = cudaSuccess;
}

cudaError_t Fail(cudaError_t error, bool sticky) {
  last_error = error;
  if (sticky) {
    Device& device = TheDevice();
    const std::lock_guard<std::mutex> lock(error_mutex);
    device.sticky = error;
  }
  return error;
}

cudaError_t StickyError() {
  Device& device = TheDevice();
  const std::lock_guard<std::mutex> lock(error_mutex);
  return device.sticky;
}

cudaError_t LastError(bool clear) {
  if (const cudaError_t sticky = StickyError(); sticky != cudaSuccess) return sticky;
  const cudaError_t error = last_error;
  if (clear) last_error = cudaSuccess;
  return error;
}

}  // namespace simt::device
