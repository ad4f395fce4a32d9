// The one order in which sums over ranks and over micro-batches are added: a binary tree over their
// index. Where n items lie on P ranks in contiguous equal shares, P being a power of two, each
// rank's share is a whole subtree, so that the sum has the same bits for every such P.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/mesh.h"

namespace sala::parallel {

// Of n > 1 items the first SumTreeLeft(n) are added up, then the others, then the two sums. Even
// counts are halved: this is what makes shares of ranks subtrees.
constexpr int64_t SumTreeLeft(int64_t n) { return n - n / 2; }

// Adds rows [first, first + n) into row `first`, the others are destroyed: add(to, from) adds one
// row to another.
template <typename AddRow>
void AddByTree(int64_t first, int64_t n, const AddRow& add) {
  if (n <= 1) return;
  const int64_t left = SumTreeLeft(n);
  AddByTree(first, left, add);
  AddByTree(first + left, n - left, add);
  add(first, first + left);
}

// Row 0 of rows [n, width] becomes their sum; the others are destroyed.
template <typename Number>
void AddRows(Number* rows, int64_t n, int64_t width) {
  AddByTree(0, n, [rows, width](int64_t to, int64_t from) {
    for (int64_t i = 0; i < width; ++i) rows[to * width + i] += rows[from * width + i];
  });
}

// Sums of `width` numbers over items that are dealt out: item i lies on rank i mod P, as row i / P
// of `mine` [this rank's items, width]. Added in order of the items, so the sums have the same bits
// for every number of ranks. Collective.
StatusOr<std::vector<double>> SumDealtItems(Communicator& comm, const std::vector<double>& mine,
                                            int64_t width);

// The same with items dealt out over the dp ranks of a mesh, where the ranks that work on the same
// item each have a term of its numbers.
StatusOr<std::vector<double>> SumDealtItems(const Mesh& mesh, std::vector<double> mine,
                                            int64_t width);

}  // namespace sala::parallel
