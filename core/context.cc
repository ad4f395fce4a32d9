#include "core/context.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "core/check.h"

namespace sala {

struct ThreadPool::State {
  std::mutex mutex;
  std::condition_variable work_ready;
  std::condition_variable work_done;
  const std::function<void(int64_t, int64_t)>* body = nullptr;
  int64_t n = 0;
  int64_t grain = 1;
  int64_t next = 0;     // first index nobody has taken
  int64_t running = 0;  // pieces taken and not finished
  bool stop = false;
  std::vector<std::thread> workers;

  // Takes pieces until none is left. The lock is held on entry and on return.
  void Drain(std::unique_lock<std::mutex>& lock) {
    while (body != nullptr && next < n) {
      const int64_t begin = next;
      const int64_t end = std::min(n, begin + grain);
      next = end;
      ++running;
      const auto* current = body;
      lock.unlock();
      (*current)(begin, end);
      lock.lock();
      --running;
    }
    if (running == 0) work_done.notify_all();
  }
};

ThreadPool::ThreadPool(int threads) : threads_(threads), state_(std::make_unique<State>()) {
  SALA_CHECK(threads >= 1) << "threads " << threads;
  for (int i = 1; i < threads; ++i) {
    state_->workers.emplace_back([state = state_.get()] {
      std::unique_lock<std::mutex> lock(state->mutex);
      while (true) {
        state->work_ready.wait(lock, [state] {
          return state->stop || (state->body != nullptr && state->next < state->n);
        });
        if (state->stop) return;
        state->Drain(lock);
      }
    });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop = true;
  }
  state_->work_ready.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
}

void ThreadPool::For(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  SALA_CHECK(grain >= 1) << "grain " << grain;
  if (threads_ == 1 || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) body(begin, std::min(n, begin + grain));
    return;
  }
  State& state = *state_;
  std::unique_lock<std::mutex> lock(state.mutex);
  SALA_CHECK(state.body == nullptr) << "ThreadPool::For must not be nested";
  state.body = &body;
  state.n = n;
  state.grain = grain;
  state.next = 0;
  state.work_ready.notify_all();
  state.Drain(lock);
  state.work_done.wait(lock, [&state] { return state.next >= state.n && state.running == 0; });
  state.body = nullptr;
}

}  // namespace sala
