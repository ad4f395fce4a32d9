#include "core/rng.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

namespace sala {
namespace {

using ::testing::ElementsAre;

TEST(Philox, KnownBlocks) {
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U));
  const uint32_t ones = 0xffffffffU;
  EXPECT_THAT(Philox4x32({ones, ones, ones, ones}, {ones, ones}),
              ElementsAre(0x408f276dU, 0x41c83b0eU, 0xa20bc7c6U, 0x6d5451fdU));
}

TEST(PhiloxStream, KnownStreams) {
  PhiloxStream rng("v1|1234|short_decay|web|0|shard_order|");
  EXPECT_EQ(rng.key(), 0x48cc7e05c4ad42f0U);
  EXPECT_EQ(rng.NextU64(), 0x745fcbc509198ea3U);
  EXPECT_EQ(rng.NextU64(), 0x15649bbcbdc62d7bU);
  rng.Seek(0);
  EXPECT_THAT(rng.Permutation(10), ElementsAre(7, 8, 6, 5, 1, 3, 9, 2, 0, 4));

  PhiloxStream second("v1|1234|short_decay|web|1|shard_order|");
  EXPECT_EQ(second.key(), 0x7b83667c6333e532U);
  EXPECT_THAT(second.Permutation(10), ElementsAre(4, 7, 9, 5, 6, 2, 3, 8, 0, 1));

  PhiloxStream third("v1|1234|short_decay|web|0|doc_order|shard-00003");
  EXPECT_EQ(third.key(), 0xb10fb858308af627U);
  EXPECT_THAT(third.Permutation(10), ElementsAre(7, 6, 1, 4, 3, 9, 5, 0, 2, 8));
}

TEST(PhiloxStream, SeekGivesTheSameDrawsAsReadingOn) {
  PhiloxStream reader(42);
  PhiloxStream seeker(42);
  for (uint64_t draw = 0; draw < 9; ++draw) {
    seeker.Seek(draw);
    EXPECT_EQ(seeker.NextU64(), reader.NextU64()) << draw;
  }
}

TEST(PhiloxStream, BoundedStaysInRangeAndIsEven) {
  PhiloxStream rng(7);
  constexpr int kDraws = 60000;
  constexpr int kSides = 6;
  std::array<int, kSides> count{};
  for (int i = 0; i < kDraws; ++i) {
    const uint64_t value = rng.Bounded(kSides);
    ASSERT_LT(value, static_cast<uint64_t>(kSides));
    ++count[value];
  }
  // Binomial: deviation sqrt(n p (1 - p)) = 91; five of them for a fixed seed.
  for (int c : count) EXPECT_NEAR(c, kDraws / kSides, 5 * 91);
  EXPECT_EQ(rng.Bounded(1), 0U);
  // n just above 2^63 rejects about half of all draws.
  const uint64_t large = (uint64_t{1} << 63) + 1;
  for (int i = 0; i < 100; ++i) EXPECT_LT(rng.Bounded(large), large);
}

TEST(PhiloxStream, DoublesAndNormals) {
  PhiloxStream rng(11);
  constexpr int kDraws = 40000;
  double sum = 0;
  double sum_of_squares = 0;
  double mean_of_uniform = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double u = rng.NextDouble();
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    mean_of_uniform += u / kDraws;
    const double x = rng.NextNormal();
    ASSERT_TRUE(std::isfinite(x));
    sum += x;
    sum_of_squares += x * x;
  }
  // Five standard errors: of the mean of uniforms sqrt(1/12/n), of normals 1/sqrt(n), of the
  // variance sqrt(2/n).
  EXPECT_NEAR(mean_of_uniform, 0.5, 5 * std::sqrt(1.0 / 12 / kDraws));
  EXPECT_NEAR(sum / kDraws, 0.0, 5 / std::sqrt(kDraws));
  EXPECT_NEAR(sum_of_squares / kDraws, 1.0, 5 * std::sqrt(2.0 / kDraws));
}

// Box and Muller's formula on two uniform numbers. That a normal number is one of its kind does not
// say which one.
TEST(PhiloxStream, NormalsAreThoseOfTheFormula) {
  PhiloxStream normals(11);
  PhiloxStream uniform(11);
  for (int i = 0; i < 1000; ++i) {
    const double radius = std::sqrt(-2 * std::log(1 - uniform.NextDouble()));
    const double angle = 2 * std::acos(-1.0) * uniform.NextDouble();
    // Rounding of an angle below 7 and of the radius, at most 8.6.
    ASSERT_NEAR(normals.NextNormal(), radius * std::cos(angle), 1e-14) << i;
  }
}

TEST(PhiloxStream, PermutationsOfEverySizeHoldEachNumberOnce) {
  PhiloxStream rng(3);
  for (int64_t n : {0, 1, 2, 17, 1000}) {
    const std::vector<int64_t> order = rng.Permutation(n);
    const std::set<int64_t> distinct(order.begin(), order.end());
    ASSERT_EQ(static_cast<int64_t>(order.size()), n);
    ASSERT_EQ(static_cast<int64_t>(distinct.size()), n);
    if (n > 0) {
      EXPECT_EQ(*distinct.begin(), 0);
      EXPECT_EQ(*distinct.rbegin(), n - 1);
    }
  }
}

}  // namespace
}  // namespace sala
