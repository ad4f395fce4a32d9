// The one order in which sums over ranks and over micro-batches are added: a binary tree over their
// index. Where n items lie on P ranks in contiguous equal shares, P being a power of two, each
// rank's share is a whole subtree, so that the sum has the same bits for every such P.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/communicator.h"

namespace sala::parallel {

// Of n > 1 items the first SumTreeLeft(n) are added up, then the others, then the two sums. Even
// counts are halved: this is what makes shares of ranks subtrees.
constexpr int64_t SumTreeLeft(int64_t n) { return n - n / 2; }

// Row 0 of rows [n, width] becomes their sum; the others are destroyed.
template <typename Number>
void AddRows(Number* rows, int64_t n, int64_t width) {
  if (n <= 1) return;
  const int64_t left = SumTreeLeft(n);
  Number* right = rows + left * width;
  AddRows(rows, left, width);
  AddRows(right, n - left, width);
  for (int64_t i = 0; i < width; ++i) rows[i] += right[i];
}

// Sums of `width` numbers over items that are dealt out: item i lies on rank i mod P, as row i / P
// of `mine` [this rank's items, width]. Added in order of the items, so the sums have the same bits
// for every number of ranks. Collective.
StatusOr<std::vector<double>> SumDealtItems(Communicator& comm, const std::vector<double>& mine,
                                            int64_t width);

}  // namespace sala::parallel
