// Exchanges that run beside the computation: one after the other, on a thread of their own, in the
// order in which they were submitted, which must be the same on all ranks. They use communicators
// that the main thread does not (Mesh::background_param_group).
//
// Where MPI may not be called from two threads, and on a GPU, whose exchanges are ordered with the
// compute stream by themselves, the queue has no thread and runs each operation when it is
// submitted.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "core/status.h"

namespace sala::parallel {

class CommQueue {
 public:
  explicit CommQueue(bool threaded);
  CommQueue(const CommQueue&) = delete;
  CommQueue& operator=(const CommQueue&) = delete;
  ~CommQueue();  // as Drain

  // Before memory that operations use is given back: waits for all of them. Ends the process with
  // 71 when that takes longer than seconds: another rank has failed, and what it still might send
  // must not meet freed memory.
  void Drain();
  bool idle() const;

  using Ticket = int64_t;
  Ticket Submit(std::function<Status()> operation);
  // Returns when this operation and all before it are done; the first error of any so far, after
  // which no more operations are run.
  Status Wait(Ticket ticket);
  Status WaitAll();

  // Seconds the callers of Wait have waited, and operations have run.
  double seconds_waited() const { return seconds_waited_; }
  double seconds_run() const;

 private:
  void Run();
  Status RunOne(const std::function<Status()>& operation);

  bool threaded_;
  mutable std::mutex mutex_;
  std::condition_variable submitted_, completed_;
  std::deque<std::function<Status()>> waiting_;
  Ticket last_ = 0;  // submitted
  Ticket done_ = 0;
  Status status_;
  bool ending_ = false;
  double seconds_waited_ = 0;
  double seconds_run_ = 0;
  std::thread thread_;
};

}  // namespace sala::parallel
