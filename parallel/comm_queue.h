// Exchanges that run beside the computation: one after the other, on a thread of their own, in the
// order in which they were submitted, which must be the same on all ranks. They use communicators
// that the main thread does not (Mesh::background_param_group).
//
// On a GPU with NCCL the operations are queued on a stream beside the compute stream when they are
// submitted: by the main thread, so that all ranks give the exchanges of all groups to NCCL in the
// same order, which it asks for. Each sees what the compute stream was given before, and Wait waits
// for it, asking for errors of other ranks meanwhile.
//
// Where MPI may not be called from two threads, and where device memory travels over MPI, the queue
// has neither: each operation runs when it is submitted.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "core/status.h"

namespace sala {
class Device;
}  // namespace sala

namespace sala::parallel {

// The stream beside the compute stream of a GPU.
class SideStream {
 public:
  virtual ~SideStream() = default;
  // The same GPU and its memory; kernels and copies of it run on this stream.
  virtual Device& device() = 0;
  // What is queued on it from now on comes after what the compute stream was given so far.
  virtual void Follow() = 0;
  // Point `ticket`, one more than the last, lies behind what was queued so far.
  virtual void Mark(int64_t ticket) = 0;
  // Whether everything in front of that point is done. Does not wait.
  virtual bool Passed(int64_t ticket) = 0;
  // An error of another rank in what is under way.
  virtual Status Failure() = 0;
};

class CommQueue {
 public:
  // `side`, which must outlive the queue, is for a GPU and without the thread.
  explicit CommQueue(bool threaded, SideStream* side = nullptr);
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
  Status WaitForSide(Ticket ticket);

  bool threaded_;
  SideStream* side_;
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
