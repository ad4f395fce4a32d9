// Ranks simulated in one process, for operations that gather numbers over ranks: a thread for each
// rank where kernels run on the CPU. (The emulator of the GPU has one thread: rank_replay.h.)
#pragma once

#include <barrier>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/common/exchange.h"

namespace sala::kernels {

// What the ranks of a run have exchanged.
class RankThreads {
 public:
  explicit RankThreads(int64_t ranks)
      : ranks_(ranks),
        barrier_(ranks),
        sent_(static_cast<size_t>(ranks)),
        sizes_(static_cast<size_t>(ranks)) {}

  // Calls body(exchange) for every rank, all at the same time, and returns when all are done.
  void Run(const std::function<void(const RankExchange& exchange)>& body) {
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < ranks_; ++rank) {
      threads.emplace_back([this, rank, &body] {
        body({.rank = rank,
              .ranks = ranks_,
              .gather = [this, rank](const Context&, const ConstTensor& mine, const Tensor& all) {
                Gather(static_cast<size_t>(rank), mine, all);
              }});
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Floats that each gathering took from a rank, in order; the same for all of them.
  const std::vector<int64_t>& sizes() const {
    for (const auto& other : sizes_) SALA_CHECK(other == sizes_[0]) << "ranks differ in sizes";
    return sizes_[0];
  }

 private:
  void Gather(size_t rank, const ConstTensor& mine, const Tensor& all) {
    const int64_t n = mine.dim(0);
    SALA_CHECK(mine.rank() == 1 && mine.contiguous() && all.rank() == 2 && all.contiguous() &&
               all.dim(0) == ranks_ && all.dim(1) == n)
        << ShapeText(mine) << ", " << ShapeText(all);
    sizes_[rank].push_back(n);
    sent_[rank] = mine.Data<float>();
    barrier_.arrive_and_wait();
    for (int64_t k = 0; k < ranks_; ++k) {
      std::memcpy(all.Row<float>(k), sent_[static_cast<size_t>(k)],
                  static_cast<size_t>(n) * sizeof(float));
    }
    barrier_.arrive_and_wait();  // nobody changes what others still read
  }

  int64_t ranks_;
  std::barrier<> barrier_;
  std::vector<const float*> sent_;
  std::vector<std::vector<int64_t>> sizes_;
};

}  // namespace sala::kernels
