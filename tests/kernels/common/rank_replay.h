// Ranks simulated one after the other, for operations that gather numbers over ranks on a device
// that one thread drives: all ranks run again and again, each time given what the run before has
// recorded, until a run sends exactly what it was given. Such a run is one that real ranks could
// have done together: every number that a rank received is what the other rank sent in it.
#pragma once

#include <functional>
#include <vector>

#include "kernels/common/exchange.h"

namespace sala::kernels {

class RankReplay {
 public:
  explicit RankReplay(int64_t ranks) : ranks_(ranks) {}

  // body(exchange) runs one rank and must start from the same inputs each time. At most
  // `most_rounds` rounds: one more than exchanges that need each other, and one to see that nothing
  // changes.
  void Run(int most_rounds, const std::function<void(const RankExchange& exchange)>& body) {
    Messages given(static_cast<size_t>(ranks_));
    for (int round = 0; round < most_rounds; ++round) {
      Messages sent(static_cast<size_t>(ranks_));
      for (int64_t rank = 0; rank < ranks_; ++rank) {
        body({.rank = rank,
              .ranks = ranks_,
              .gather = [&](const Context& ctx, const ConstTensor& mine, const Tensor& all) {
                Gather(given, ctx, mine, all, sent[static_cast<size_t>(rank)]);
              }});
      }
      for (const auto& other : sent) {
        SALA_CHECK(other.size() == sent[0].size()) << "ranks differ in how often they exchange";
        for (size_t i = 0; i < other.size(); ++i) {
          SALA_CHECK(other[i].size() == sent[0][i].size()) << "ranks differ in sizes";
        }
      }
      if (sent == given) {
        sizes_.clear();
        for (const auto& message : sent[0]) sizes_.push_back(static_cast<int64_t>(message.size()));
        return;
      }
      given = std::move(sent);
    }
    SALA_CHECK(false) << "the ranks do not agree after " << most_rounds << " rounds";
  }

  // Floats that each gathering took from a rank, in order.
  const std::vector<int64_t>& sizes() const { return sizes_; }

 private:
  // As words, so that a NaN equals itself: [rank][exchange][n].
  using Messages = std::vector<std::vector<std::vector<uint32_t>>>;

  void Gather(const Messages& given, const Context& ctx, const ConstTensor& mine, const Tensor& all,
              std::vector<std::vector<uint32_t>>& sent) const {
    const int64_t n = mine.dim(0);
    SALA_CHECK(mine.rank() == 1 && mine.contiguous() && all.rank() == 2 && all.contiguous() &&
               all.dim(0) == ranks_ && all.dim(1) == n)
        << ShapeText(mine) << ", " << ShapeText(all);
    std::vector<uint32_t> words(static_cast<size_t>(n));
    const size_t bytes = words.size() * sizeof(uint32_t);
    ctx.gpu->Download(words.data(), mine.raw(), bytes);
    for (int64_t k = 0; k < ranks_; ++k) {
      const auto& recorded = given[static_cast<size_t>(k)];
      // Nothing recorded yet: zeros, which the next round replaces.
      const std::vector<uint32_t> row = sent.size() < recorded.size()
                                            ? recorded[sent.size()]
                                            : std::vector<uint32_t>(words.size());
      SALA_CHECK(row.size() == words.size()) << "sizes change from round to round";
      ctx.gpu->Upload(all.Rows(k, k + 1).raw(), row.data(), bytes);
    }
    sent.push_back(std::move(words));
  }

  int64_t ranks_;
  std::vector<int64_t> sizes_;
};

}  // namespace sala::kernels
