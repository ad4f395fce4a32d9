// Seeds are accepted, and thousands of damaged ones are refused or accepted without a crash, and
// without memory out of proportion. launch/fuzz goes on where this ends.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/targets.h"

namespace sala::fuzz {
namespace {

constexpr int kMutations = 1500;  // a target

// One to four changes: bytes, runs, numbers and pieces of other seeds.
std::string Mutated(std::string text, const std::vector<std::string>& seeds, std::mt19937& random) {
  const auto below = [&random](size_t n) { return n == 0 ? 0 : random() % n; };
  const std::vector<std::string> pieces = {"\"",
                                           "[",
                                           "{",
                                           "}",
                                           ":",
                                           "-1",
                                           "1e999",
                                           "4294967296",
                                           "18446744073709551615",
                                           "null",
                                           "\xff",
                                           "\\u0000",
                                           std::string(1, '\0'),
                                           "    ",
                                           "\n"};
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    const size_t at = below(text.size());
    const size_t count = 1 + below(16);
    switch (below(6)) {
      case 0:
        if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 1:
        text.erase(at, count);
        break;
      case 2:
        text.insert(at, pieces[below(pieces.size())]);
        break;
      case 3:
        text.resize(at);
        break;
      case 4:
        text.insert(at, text.substr(below(text.size()), count));
        break;
      default: {
        const std::string& other = seeds[below(seeds.size())];
        text.replace(at, count, other.substr(below(other.size()), count));
      }
    }
  }
  return text;
}

class Fuzz : public ::testing::TestWithParam<size_t> {};

TEST_P(Fuzz, SeedsAndMutations) {
  const Target& target = Targets()[GetParam()];
  const std::vector<std::string> seeds = target.seeds();
  ASSERT_FALSE(seeds.empty());
  for (const std::string& seed : seeds) EXPECT_TRUE(target.run(seed)) << target.name;
  std::mt19937 random(1);
  int refused = 0;
  for (int i = 0; i < kMutations; ++i) {
    const std::string input = Mutated(seeds[static_cast<size_t>(i) % seeds.size()], seeds, random);
    ResetLargestAllocation();
    refused += target.run(input) ? 0 : 1;
    ASSERT_LE(LargestAllocation(), 16 * input.size() + kFixedBytes)
        << target.name << ", mutation " << i;
  }
  // Most damage is noticed; what is not lies in white space, comments and free values.
  EXPECT_GT(refused, kMutations / 4) << target.name;
}

INSTANTIATE_TEST_SUITE_P(Targets, Fuzz, ::testing::Range(size_t{0}, Targets().size()),
                         [](const auto& target) { return Targets()[target.param].name; });

}  // namespace
}  // namespace sala::fuzz
