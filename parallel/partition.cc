#include "parallel/partition.h"

#include <algorithm>

namespace sala::parallel {

FlatPartition FlatPartition::Even(int64_t n, int ranks, int64_t alignment) {
  FlatPartition partition;
  const int64_t units = (n + alignment - 1) / alignment;
  for (int64_t r = 0; r <= ranks; ++r)
    partition.begin.push_back(std::min(n, units * r / ranks * alignment));
  for (size_t r = 0; r + 1 < partition.begin.size(); ++r) {
    partition.counts.push_back(partition.begin[r + 1] - partition.begin[r]);
  }
  return partition;
}

UnitPartition::UnitPartition(std::span<const int64_t> borders, int ranks,
                             std::span<const int64_t> alignments)
    : ranks_(ranks), borders_(borders.begin(), borders.end()) {
  shard_.emplace_back(static_cast<size_t>(ranks), 0);
  for (size_t u = 0; u + 1 < borders_.size(); ++u) {
    const int64_t alignment = alignments.empty() ? 16 : alignments[u];
    pieces_.push_back(FlatPartition::Even(borders_[u + 1] - borders_[u], ranks, alignment));
    std::vector<int64_t> next = shard_.back();
    for (size_t r = 0; r < next.size(); ++r) next[r] += pieces_.back().counts[r];
    shard_.push_back(std::move(next));
  }
}

int64_t UnitPartition::shard_begin(int64_t u, int r) const {
  return shard_[static_cast<size_t>(u)][static_cast<size_t>(r)];
}

}  // namespace sala::parallel
