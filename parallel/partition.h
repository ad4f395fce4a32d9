// How flat buffers are cut over ranks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace sala::parallel {

// n elements cut over ranks in contiguous pieces, as even as multiples of `alignment` allow.
struct FlatPartition {
  std::vector<int64_t> begin;   // [ranks + 1], first 0, last n
  std::vector<int64_t> counts;  // [ranks]

  static FlatPartition Even(int64_t n, int ranks, int64_t alignment = 16);
};

// A flat buffer of units (a layer, the embedding, ...) one after the other, each cut over the ranks
// on its own, so that it can be summed or gathered alone. A rank's shard is its pieces of all units
// one after the other.
class UnitPartition {
 public:
  UnitPartition() = default;
  // borders [units + 1]. Pieces are multiples of `alignments` [units]; empty: of 16 elements.
  UnitPartition(std::span<const int64_t> borders, int ranks,
                std::span<const int64_t> alignments = {});

  int64_t units() const { return static_cast<int64_t>(pieces_.size()); }
  int ranks() const { return ranks_; }
  // Elements [unit_begin, unit_end) of the buffer are unit u.
  int64_t unit_begin(int64_t u) const { return borders_[static_cast<size_t>(u)]; }
  int64_t unit_end(int64_t u) const { return borders_[static_cast<size_t>(u) + 1]; }
  int64_t unit_size(int64_t u) const { return unit_end(u) - unit_begin(u); }
  // Elements of unit u for each rank.
  const std::vector<int64_t>& counts(int64_t u) const {
    return pieces_[static_cast<size_t>(u)].counts;
  }
  // The piece of unit u that rank r has: elements [begin, end) of the buffer.
  int64_t begin(int64_t u, int r) const {
    return unit_begin(u) + pieces_[static_cast<size_t>(u)].begin[static_cast<size_t>(r)];
  }
  int64_t end(int64_t u, int r) const { return begin(u, r + 1); }
  // Where that piece lies in the rank's shard, and the size of the shard.
  int64_t shard_begin(int64_t u, int r) const;
  int64_t shard_size(int r) const { return shard_begin(units(), r); }

 private:
  int ranks_ = 1;
  std::vector<int64_t> borders_;
  std::vector<FlatPartition> pieces_;        // [units], counted from the unit's begin
  std::vector<std::vector<int64_t>> shard_;  // [units + 1][ranks]
};

}  // namespace sala::parallel
