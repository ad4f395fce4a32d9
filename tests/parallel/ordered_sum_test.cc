#include "parallel/ordered_sum.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace sala::parallel {
namespace {

// Sixteen powers of two and both signs: another order of adding gives other bits.
std::vector<float> Rows(int64_t n, int64_t width) {
  std::vector<float> rows;
  for (int64_t i = 0; i < n * width; ++i) {
    rows.push_back(
        (i % 3 == 0 ? -1.0F : 1.0F) *
        std::ldexp(1.0F + 0.37F * static_cast<float>(i % 11), static_cast<int>(i * 7 % 16)));
  }
  return rows;
}

bool SameBits(const float* a, const float* b, int64_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(float)) == 0;
}

TEST(SumTree, SharesOfRanksAreSubtrees) {
  constexpr int64_t kWidth = 33;
  for (const int64_t items : {8, 16, 24, 40, 56, 1000}) {
    std::vector<float> whole = Rows(items, kWidth);
    AddRows(whole.data(), items, kWidth);
    for (const int64_t ranks : {2, 4, 8}) {
      std::vector<float> rows = Rows(items, kWidth);
      std::vector<float> sums;
      for (int64_t r = 0; r < ranks; ++r) {
        float* share = rows.data() + r * (items / ranks) * kWidth;
        AddRows(share, items / ranks, kWidth);
        sums.insert(sums.end(), share, share + kWidth);
      }
      AddRows(sums.data(), ranks, kWidth);
      EXPECT_TRUE(SameBits(sums.data(), whole.data(), kWidth))
          << items << " items on " << ranks << " ranks";
    }
    std::vector<float> in_order = Rows(items, kWidth);
    for (int64_t i = kWidth; i < items * kWidth; ++i) {
      in_order[static_cast<size_t>(i % kWidth)] += in_order[static_cast<size_t>(i)];
    }
    EXPECT_FALSE(SameBits(in_order.data(), whole.data(), kWidth))
        << "these rows tell no orders apart";
  }
}

TEST(SumTree, AddsEveryRowOnce) {
  for (int64_t n = 1; n <= 20; ++n) {
    std::vector<double> rows;
    for (int64_t i = 0; i < n; ++i) rows.push_back(std::exp2(i));
    AddRows(rows.data(), n, 1);
    EXPECT_EQ(rows[0], std::exp2(n) - 1) << n;
  }
  std::vector<double> none;
  AddRows(none.data(), 0, 1);
}

}  // namespace
}  // namespace sala::parallel
