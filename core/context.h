// What an operation runs on: the device, its worker threads and its work space. The first argument
// of every kernel.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/arena.h"
#include "core/device.h"
#include "core/tensor.h"

namespace sala {

// A pool of worker threads that block (never spin) between jobs. With threads = 1 everything runs
// on the caller.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int threads() const { return threads_; }

  // Calls body(begin, end) over [0, n) cut in pieces of `grain` (the last may be shorter) and
  // returns when all are done. The cut depends on n and grain only, never on the number of threads,
  // so a reduction that keeps one partial result per piece and adds them in order has the same bits
  // for any thread count. `body` must not call For again.
  void For(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

 private:
  struct State;
  int threads_;
  std::unique_ptr<State> state_;
};

struct Context {
  DeviceKind device = DeviceKind::kCpu;
  ThreadPool* pool = nullptr;  // never null when a kernel is called
  Arena* scratch = nullptr;  // work space; a kernel gives back all it takes before it returns. Only
                             // the calling thread may use it
  Device* gpu = nullptr;     // where device is kCuda; scratch is memory of this device

  bool cuda() const { return device == DeviceKind::kCuda; }
  // Number type of parameters and activations: float32 on a CPU, bfloat16 on a GPU. Statistics,
  // states, gradients of parameters and masters are float32 on both.
  DType activation() const { return cuda() ? DType::kBF16 : DType::kF32; }
};

}  // namespace sala
