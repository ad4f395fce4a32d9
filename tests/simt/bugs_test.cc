// Which planted bug is found, by what, in this build: planted_bugs.cc has them. A bug that a build
// cannot find is listed as such, so that this table says what each kind of build is good for.
#include <gtest/gtest.h>

#include <string>

#include "tests/simt/child.h"

namespace {

using simt_test::Child;
using simt_test::ChildResult;

// What a build says to a bug.
enum class Finding {
  kMissed,     // right answer
  kWrong,      // wrong answer, which a test of the kernel finds
  kReport,     // a report of the emulator
  kAddress,    // AddressSanitizer
  kUndefined,  // UndefinedBehaviorSanitizer
  kRace,       // ThreadSanitizer
};

struct Expectation {
  const char* bug;
  Finding plain;
  Finding address;  // with UndefinedBehaviorSanitizer
  Finding thread;
  const char* report;  // part of the emulator's text
};

constexpr auto kMissed = Finding::kMissed;
constexpr auto kWrong = Finding::kWrong;
constexpr auto kReport = Finding::kReport;
constexpr auto kAddress = Finding::kAddress;
constexpr auto kUndefined = Finding::kUndefined;
constexpr auto kRace = Finding::kRace;

constexpr Expectation kExpectations[] = {
    {"none", kMissed, kMissed, kMissed, ""},
    {"missing_barrier", kWrong, kWrong, kRace, ""},
    {"missing_barrier_by_luck", kMissed, kMissed, kRace, ""},
    {"missing_second_barrier", kWrong, kWrong, kRace, ""},
    {"divergent_barrier", kReport, kReport, kReport, "different barriers"},
    {"barrier_in_half_a_warp", kReport, kReport, kReport, "not all lanes of the mask come"},
    {"divergent_shuffle", kReport, kReport, kReport, "ends while others wait for it"},
    {"shuffles_in_two_branches", kReport, kReport, kReport, "not all lanes of the mask come"},
    {"shuffle_from_exited_lane", kReport, kReport, kReport, "ends while others wait for it"},
    {"shuffle_as_fence", kMissed, kMissed, kRace, ""},
    {"mma_in_half_a_warp", kReport, kReport, kReport, "ends while others wait for it"},
    {"missing_copy_wait", kWrong, kWrong, kWrong, ""},
    {"wait_for_too_few_copies", kWrong, kWrong, kWrong, ""},
    {"group_never_waited_for", kReport, kReport, kReport, "without waiting for this cp.async"},
    {"copy_over_readers", kWrong, kWrong, kRace, ""},
    {"misaligned_copy", kReport, kReport, kReport, "cp.async is not aligned to 16 bytes"},
    {"misaligned_ldmatrix", kReport, kReport, kReport, "ldmatrix is not aligned to 16 bytes"},
    {"ldmatrix_without_barrier", kWrong, kWrong, kRace, ""},
    {"shared_write_behind", kReport, kAddress, kReport, "outside of piece 0 of shared memory"},
    {"shared_write_before", kReport, kAddress, kReport, "outside of piece 1 of shared memory"},
    {"shared_read_behind", kWrong, kAddress, kWrong, ""},
    {"unset_shared", kWrong, kWrong, kWrong, ""},
    {"unset_output", kWrong, kWrong, kWrong, ""},
    {"global_write_behind", kReport, kAddress, kReport, "a write behind device memory"},
    {"global_read_behind", kMissed, kAddress, kMissed, ""},
    {"misaligned_vector", kMissed, kUndefined, kMissed, ""},
    {"sum_without_atomic", kMissed, kMissed, kRace, ""},
    {"race_between_blocks", kMissed, kMissed, kRace, ""},
    {"takes_too_much", kReport, kReport, kReport,
     "4608 bytes taken (pieces rounded up to 128), 4096 given"},
    {"takes_in_different_order", kReport, kReport, kReport, "different order or size"},
    {"too_much_shared_at_launch", kReport, kReport, kReport, "the limit is 232448"},
    {"too_many_threads", kReport, kReport, kReport, "the limit is 1024"},
    {"missing_stream_synchronize", kWrong, kWrong, kRace, ""},
    {"missing_event", kWrong, kWrong, kWrong, ""},
    {"missing_event_by_luck", kMissed, kMissed, kRace, ""},
    {"launch_on_freed_memory", kMissed, kAddress, kMissed, ""},
};

Finding OfThisBuild(const Expectation& expectation) {
#if defined(__SANITIZE_ADDRESS__)
  return expectation.address;
#elif defined(__SANITIZE_THREAD__)
  return expectation.thread;
#else
  return expectation.plain;
#endif
}

ChildResult RunBug(const std::string& bug, const std::string& environment) {
  return Child(environment + " " SIMT_PLANTED_BUGS " " + bug);
}

class PlantedBug : public testing::TestWithParam<Expectation> {};

TEST_P(PlantedBug, IsFound) {
  const Expectation& expectation = GetParam();
  const ChildResult result = RunBug(expectation.bug, "");
  switch (OfThisBuild(expectation)) {
    case kMissed:
      EXPECT_EQ(result.exit_code, 0) << result.output;
      break;
    case kWrong:
      EXPECT_EQ(result.exit_code, 4) << result.output;
      break;
    case kReport:
      EXPECT_EQ(result.exit_code, 3) << result.output;
      EXPECT_NE(result.output.find(expectation.report), std::string::npos) << result.output;
      break;
    case kAddress:
      EXPECT_EQ(result.exit_code, 1) << result.output;
      EXPECT_NE(result.output.find("ERROR: AddressSanitizer"), std::string::npos) << result.output;
      break;
    case kUndefined:
      EXPECT_EQ(result.exit_code, 1) << result.output;
      EXPECT_NE(result.output.find("runtime error"), std::string::npos) << result.output;
      break;
    case kRace:
      EXPECT_EQ(result.exit_code, 66) << result.output;
      EXPECT_NE(result.output.find("data race"), std::string::npos) << result.output;
      break;
  }
}

INSTANTIATE_TEST_SUITE_P(All, PlantedBug, testing::ValuesIn(kExpectations),
                         [](const auto& bug) { return std::string(bug.param.bug); });

#if !defined(__SANITIZE_THREAD__)
// What passes by luck in the natural order shows in another one.
TEST(PlantedBugOrder, SomeSeedShowsIt) {
  for (const char* bug : {"missing_barrier_by_luck", "race_between_blocks"}) {
    int wrong = 0;
    for (int seed = 1; seed <= 8; ++seed) {
      const auto result = RunBug(bug, "SALA_SIMT_SEED=" + std::to_string(seed));
      wrong += result.exit_code == 4 ? 1 : 0;
    }
    EXPECT_GT(wrong, 0) << bug;
  }
}
#endif

TEST(Report, NamesKernelBlockThreadAndLine) {
  const ChildResult result = RunBug("divergent_barrier", "");
  EXPECT_NE(result.output.find("planted_bugs.cc:"), std::string::npos) << result.output;
  EXPECT_NE(result.output.find("in kernel planted, block (0,0,0), thread (32,0,0)"),
            std::string::npos)
      << result.output;
  EXPECT_NE(result.output.find("thread 0 to 31 waiting in __syncthreads at"), std::string::npos)
      << result.output;
}

}  // namespace
