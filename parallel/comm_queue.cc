#include "parallel/comm_queue.h"

#include <unistd.h>

#include <chrono>
#include <exception>
#include <utility>

#include "core/clock.h"
#include "core/device.h"
#include "core/log.h"
#include "core/trace.h"

namespace sala::parallel {
namespace {

constexpr std::chrono::seconds kPatience{5};
constexpr std::chrono::microseconds kBetweenQuestions{20};  // to a GPU

}  // namespace

CommQueue::CommQueue(bool threaded, SideStream* side) : threaded_(threaded), side_(side) {
  if (threaded) thread_ = std::thread([this] { Run(); });
}

CommQueue::~CommQueue() {
  Drain();
  if (!threaded_) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
    submitted_.notify_all();
  }
  thread_.join();
}

void CommQueue::Drain() {
  if (side_ != nullptr) {
    const auto until = std::chrono::steady_clock::now() + kPatience;
    while (done_ < last_ && std::chrono::steady_clock::now() < until) {
      try {
        if (side_->Passed(last_)) done_ = last_;
      } catch (const DeviceError&) {
        done_ = last_;  // after a fault of the GPU nothing runs on it any more
      }
      std::this_thread::sleep_for(kBetweenQuestions);
    }
  }
  std::unique_lock<std::mutex> lock(mutex_);
  if (completed_.wait_for(lock, side_ == nullptr ? kPatience : std::chrono::seconds(0),
                          [this] { return done_ == last_; }))
    return;
  SALA_LOG(Error) << "COMM-FAILED: an exchange beside the computation does not complete: this rank "
                     "or another one has failed; see the lines above and the other ranks' logs";
  _exit(static_cast<int>(ExitCode::kDevice));
}

bool CommQueue::idle() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return done_ == last_;
}

CommQueue::Ticket CommQueue::Submit(std::function<Status()> operation) {
  if (!threaded_) {
    if (side_ != nullptr) side_->Follow();
    if (status_.ok()) status_ = RunOne(operation);
    ++last_;
    if (side_ != nullptr) {
      side_->Mark(last_);
    } else {
      done_ = last_;
    }
    return last_;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  waiting_.push_back(std::move(operation));
  submitted_.notify_all();
  return ++last_;
}

Status CommQueue::Wait(Ticket ticket) {
  const TraceScope trace("wait for an exchange");
  const double started = ClockSeconds();
  if (side_ != nullptr) {
    status_ = WaitForSide(ticket);
    seconds_waited_ += ClockSeconds() - started;
    return status_;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  completed_.wait(lock, [this, ticket] { return done_ >= ticket; });
  seconds_waited_ += ClockSeconds() - started;
  return status_;
}

Status CommQueue::WaitForSide(Ticket ticket) {
  while (status_.ok() && done_ < ticket) {
    if (side_->Passed(ticket)) {
      done_ = ticket;
      break;
    }
    SALA_RETURN_IF_ERROR(side_->Failure());
    std::this_thread::sleep_for(kBetweenQuestions);
  }
  return status_;
}

Status CommQueue::WaitAll() { return Wait(last_); }

double CommQueue::seconds_run() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return seconds_run_;
}

// An exception (of a device) has no caller to go to on this thread.
Status CommQueue::RunOne(const std::function<Status()>& operation) {
  const double started = ClockSeconds();
  Status status;
  if (threaded_) {
    try {
      status = operation();
    } catch (const std::exception& error) {
      status = MakeError(ExitCode::kDevice, "COMM-FAILED", error.what());
    }
  } else {
    status = operation();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  seconds_run_ += ClockSeconds() - started;
  return status;
}

void CommQueue::Run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    submitted_.wait(lock, [this] { return ending_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    const std::function<Status()> operation = std::move(waiting_.front());
    waiting_.pop_front();
    const bool failed = !status_.ok();
    lock.unlock();
    const Status status = failed ? OkStatus() : RunOne(operation);
    lock.lock();
    if (!status.ok()) status_ = status;
    ++done_;
    completed_.notify_all();
  }
}

}  // namespace sala::parallel
