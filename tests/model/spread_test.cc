#include "model/spread.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/lightning/lightning.h"

namespace sala::model {
namespace {

TokenShare Ranges(std::vector<int64_t> borders) {
  TokenShare share;
  share.total = borders.back();
  share.cp_borders = std::move(borders);
  return share;
}

// By the definition: the farthest range whose state still counts when it enters another one. What
// is handed on by a neighbour always counts; what comes from further away has passed the ranges in
// between.
int64_t ByDefinition(const TokenShare& share, double slope) {
  const auto ranges = static_cast<int64_t>(share.cp_borders.size()) - 1;
  int64_t farthest = 0;
  for (int64_t to = 0; to < ranges; ++to) {
    for (int64_t from = 0; from < to; ++from) {
      const int64_t between = share.cp_borders[static_cast<size_t>(to)] -
                              share.cp_borders[static_cast<size_t>(from) + 1];
      const bool counts = std::exp(-slope * static_cast<double>(between)) > std::exp2(-25.0);
      if (counts || from + 1 == to) farthest = std::max(farthest, to - from);
    }
  }
  return farthest;
}

TEST(StateWindowTest, IsTheFarthestRangeWhoseStateCounts) {
  // ln(2^25) = 17.33: with a slope of 1 a state passes 17 tokens and not 18.
  EXPECT_EQ(StateWindow(Ranges({0, 17, 34, 51}), {1.0F}), 2);
  EXPECT_EQ(StateWindow(Ranges({0, 18, 36, 54}), {1.0F}), 1);
  // The slowest head decides.
  EXPECT_EQ(StateWindow(Ranges({0, 18, 36, 54}), {1.0F, 0.5F, 2.0F}), 2);
  EXPECT_EQ(StateWindow(Ranges({0, 100}), {1.0F}), 0) << "one rank";
  EXPECT_EQ(StateWindow(Ranges({0, 1000, 2000}), {1.0F}), 1) << "a neighbour always";
  EXPECT_EQ(StateWindow(Ranges({0, 10, 20, 30, 40}), {}), 3) << "no decay known: all";
  EXPECT_EQ(StateWindow(Ranges({0, 0, 0, 0, 7}), {9.0F}), 3) << "nothing is passed";
  uint64_t state = 3;
  const auto below = [&state](uint64_t n) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<int64_t>((state >> 33) % n);
  };
  for (int round = 0; round < 500; ++round) {
    std::vector<int64_t> borders = {0};
    const int64_t ranges = 1 + below(8);
    for (int64_t r = 0; r < ranges; ++r) borders.push_back(borders.back() + below(200));
    std::vector<float> slopes = kernels::LightningSlopes(1 + below(16));
    const TokenShare share = Ranges(borders);
    EXPECT_EQ(StateWindow(share, slopes),
              ByDefinition(share, *std::min_element(slopes.begin(), slopes.end())));
  }
}

TEST(SpreadTest, OneRankHasAllTokens) {
  const Spread alone;
  for (const int64_t total : {int64_t{0}, int64_t{1}, int64_t{1000}}) {
    const TokenShare share = alone.Share(total);
    EXPECT_EQ(share.cp_borders, (std::vector<int64_t>{0, total}));
    EXPECT_EQ(share.tokens(), total);
    EXPECT_EQ(share.part(), total);
  }
  EXPECT_TRUE(alone.counts());
  EXPECT_EQ(alone.exchange(), nullptr);
}

}  // namespace
}  // namespace sala::model
