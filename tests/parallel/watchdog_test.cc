#include "parallel/watchdog.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "core/file.h"

namespace sala::parallel {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

const std::vector<std::string> kHosts = {"fa", "fa", "fb", "fb"};

// A rank that has done the world's collectives up to number `done` and, with `running`, waits in
// the next one.
RankFault Fault(int rank, int64_t done, bool running, const std::string& kind = "all_reduce") {
  RankFault fault;
  fault.rank = rank;
  fault.host = kHosts[static_cast<size_t>(rank)];
  fault.section = "step";
  fault.seconds = 301;
  fault.step = 12;
  fault.groups["0"] = {.name = "world", .ranks = {0, 1, 2, 3}};
  for (int64_t n = std::max<int64_t>(1, done - 2); n <= done + (running ? 1 : 0); ++n) {
    fault.calls.push_back({.communicator = "0",
                           .number = n,
                           .sequence = n,
                           .kind = n > done ? kind : "all_reduce",
                           .bytes = 40,
                           .running = n > done,
                           .seconds = n > done ? 301.0 : 0.0});
  }
  return fault;
}

TEST(FaultReportTest, ARankWithoutAFileIsTheCulprit) {
  const FaultReport report =
      ExplainFaults({Fault(0, 7, true), Fault(1, 7, true), Fault(3, 7, true)}, kHosts);
  EXPECT_THAT(report.culprits, ElementsAre(2));
  EXPECT_THAT(report.paragraph, HasSubstr("rank 2@fb did not arrive and left no fault file"));
  EXPECT_THAT(
      report.paragraph,
      HasSubstr("ranks 0, 1@fa and rank 3@fb wait for 301 s in all_reduce number 8 of group "
                "world (ranks 0-3, 40 bytes, sequence 8), section step, after step 12"));
  EXPECT_EQ(report.paragraph.find('\n'), std::string::npos);
  EXPECT_EQ(report.divergence,
            "all_reduce number 8 of group world (ranks 0-3, 40 bytes, sequence 8): rank 0@fa: "
            "entered; rank 1@fa: entered; rank 2@fb: no fault file; rank 3@fb: entered");
}

TEST(FaultReportTest, SlowWorkIsNotTakenForAHang) {
  std::vector<RankFault> faults;
  for (int rank = 0; rank < 4; ++rank) {
    faults.push_back(Fault(rank, 7, true));
    faults.back().calls.back().seconds = 0.2;
  }
  const FaultReport report = ExplainFaults(faults, kHosts);
  EXPECT_THAT(report.culprits, ElementsAre());
  EXPECT_THAT(report.paragraph, HasSubstr("no rank is missing and none hangs"));
  EXPECT_THAT(report.paragraph, HasSubstr("wait for 0.2 s in all_reduce number 8"));
  EXPECT_THAT(report.paragraph, HasSubstr("the section has lasted 301 s"));
  EXPECT_THAT(report.paragraph, Not(HasSubstr("network")));
}

TEST(FaultReportTest, ARankThatStandsOutsideOfCollectivesIsTheCulprit) {
  const FaultReport report = ExplainFaults(
      {Fault(0, 7, true), Fault(1, 7, false), Fault(2, 7, true), Fault(3, 7, true)}, kHosts);
  EXPECT_THAT(report.culprits, ElementsAre(1));
  EXPECT_THAT(report.paragraph, HasSubstr("rank 1@fa did not arrive: outside of any collective"));
  EXPECT_THAT(report.divergence, HasSubstr("rank 1@fa: not entered"));
}

TEST(FaultReportTest, RanksOfAnotherCollectiveAreTheCulprits) {
  const FaultReport report = ExplainFaults(
      {Fault(0, 7, true), Fault(1, 7, true), Fault(2, 7, true), Fault(3, 7, true, "barrier")},
      kHosts);
  EXPECT_THAT(report.culprits, ElementsAre(3));
  EXPECT_THAT(report.paragraph, HasSubstr("different collectives"));
  EXPECT_THAT(report.paragraph, HasSubstr("is barrier on rank 3@fb"));
  EXPECT_THAT(report.divergence, HasSubstr("rank 3@fb: entered as barrier"));
}

// A rank that is late because it waits itself, for one that is silent, is no culprit.
TEST(FaultReportTest, TheChainOfWaitingEndsAtTheCulprit) {
  RankFault waits_in_part = Fault(2, 7, false);
  waits_in_part.groups["0.1"] = {.name = "tp", .ranks = {2, 3}};
  waits_in_part.calls.push_back({.communicator = "0.1",
                                 .number = 5,
                                 .sequence = 8,
                                 .kind = "all_gather",
                                 .bytes = 99,
                                 .running = true});
  const FaultReport report =
      ExplainFaults({Fault(0, 7, true), Fault(1, 7, true), waits_in_part}, kHosts);
  EXPECT_THAT(report.culprits, ElementsAre(3));
}

TEST(FaultReportTest, WhereNobodyIsMissingTheNetworkIsTheCause) {
  // Those of fb already had everything of number 8.
  const FaultReport report = ExplainFaults(
      {Fault(0, 7, true), Fault(1, 7, true), Fault(2, 8, true), Fault(3, 8, true)}, kHosts);
  EXPECT_TRUE(report.culprits.empty());
  EXPECT_THAT(report.paragraph, HasSubstr("no rank is missing"));
  EXPECT_THAT(report.paragraph, HasSubstr("carry it: ranks 0, 1@fa and ranks 2, 3@fb"));
  EXPECT_THAT(report.paragraph, HasSubstr("ranks 0, 1@fa wait for 301 s in all_reduce number 8 "));
  EXPECT_THAT(report.paragraph, HasSubstr("; ranks 2, 3@fb wait for 301 s in all_reduce number 9"));
}

TEST(FaultReportTest, ACallThatFellOutOfTheLogIsNotMissing) {
  RankFault ahead = Fault(3, 300, true);
  const FaultReport report =
      ExplainFaults({Fault(0, 7, true), Fault(1, 7, true), Fault(2, 7, true), ahead}, kHosts);
  EXPECT_THAT(report.divergence, HasSubstr("number 298"));  // what others did before it is known
}

TEST(FaultReportTest, FilesAreReadBack) {
  const RankFault fault = Fault(2, 7, true);
  const auto back = RankFault::FromJson(fault.ToJson());
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->ToJson(), fault.ToJson());
  EXPECT_EQ(ErrorCodeOf(RankFault::FromJson("{\"rank\": 3").status()), "FAULT-FORMAT");
  EXPECT_EQ(ErrorCodeOf(RankFault::FromJson("[]").status()), "FAULT-FORMAT");
}

class WatchdogTest : public testing::Test {
 protected:
  WatchdogTest() : logs_(testing::TempDir() + "/watchdog-logs") {
    std::filesystem::remove_all(logs_);
    std::filesystem::create_directories(logs_);
  }
  ~WatchdogTest() override { std::filesystem::remove_all(logs_); }

  std::string logs_;
  CommLog log_;
};
using WatchdogDeathTest = WatchdogTest;

WatchdogConfig Limits(double step) {
  WatchdogConfig config;
  config.step_seconds = step;
  return config;
}

TEST_F(WatchdogDeathTest, AnExpiredSectionEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        Watchdog watchdog(Limits(0.2), log_, logs_, 0, {"fa"}, "now");
        const Section run(watchdog, Phase::kInit);
        const Section step(watchdog, Phase::kStep, 41);
        std::this_thread::sleep_for(std::chrono::seconds(60));
      },
      testing::ExitedWithCode(71),
      "WATCHDOG: rank 0@fa did not arrive: outside of any collective for .*, section step, after "
      "step 41");
}

// A hang before the files of an earlier start are moved aside.
TEST_F(WatchdogDeathTest, FilesOfAnotherStartAreNotThere) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        RankFault old = Fault(0, 7, true);
        old.start = "before";
        static_cast<void>(WriteFileAtomically(logs_ + "/fault-rank-00000.json", old.ToJson()));
        static_cast<void>(
            WriteFileAtomically(logs_ + "/fault-report.txt", "a verdict\nstart: before\n"));
        Watchdog watchdog(Limits(0.2), log_, logs_, 1, {"fa", "fb"}, "now");
        const Section step(watchdog, Phase::kStep, 41);
        std::this_thread::sleep_for(std::chrono::seconds(60));
      },
      testing::ExitedWithCode(71), "WATCHDOG: rank 0@fa did not arrive and left no fault file");
}

TEST_F(WatchdogDeathTest, AVerdictThatIsThereIsNotGivenAgain) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        static_cast<void>(
            WriteFileAtomically(logs_ + "/fault-report.txt", "a verdict\nstart: now\n"));
        Watchdog watchdog(Limits(0.2), log_, logs_, 0, {"fa"}, "now");
        const Section step(watchdog, Phase::kStep, 41);
        std::this_thread::sleep_for(std::chrono::seconds(60));
      },
      testing::ExitedWithCode(71), "^$");
}

TEST_F(WatchdogTest, SectionsInsideTheirLimitDoNothing) {
  Watchdog watchdog(Limits(0.3), log_, logs_, 0, {"fa"}, "now");
  const Section run(watchdog, Phase::kInit);
  // Together longer than the limit: each step starts anew, and what is outside has another limit.
  for (int i = 0; i < 4; ++i) {
    const Section step(watchdog, Phase::kStep, i);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  EXPECT_TRUE(ListDirectory(logs_)->empty());
}

TEST_F(WatchdogTest, NoLimitIsNoLimit) {
  Watchdog watchdog(Limits(0), log_, logs_, 0, {"fa"}, "now");
  const Section step(watchdog, Phase::kStep, 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_TRUE(ListDirectory(logs_)->empty());
}

TEST_F(WatchdogTest, FilesOfAnEarlierStartAreMovedAside) {
  ASSERT_TRUE(
      WriteFileAtomically(logs_ + "/fault-rank-00002.json", Fault(2, 7, true).ToJson()).ok());
  const auto before = ExplainRun(logs_);
  ASSERT_TRUE(before.ok()) << before.status();
  ASSERT_TRUE(PrepareFaultDirectory(logs_, kHosts).ok());
  EXPECT_EQ(ErrorCodeOf(ExplainRun(logs_).status()), "FILE-MISSING");
  EXPECT_TRUE(PathExists(logs_ + "/earlier/fault-rank-00002.json"));
  ASSERT_TRUE(
      WriteFileAtomically(logs_ + "/fault-rank-00000.json", Fault(0, 7, true).ToJson()).ok());
  const auto after = ExplainRun(logs_);
  ASSERT_TRUE(after.ok());
  EXPECT_THAT(after->paragraph, HasSubstr("rank 1@fa and ranks 2, 3@fb did not arrive"));
}

}  // namespace
}  // namespace sala::parallel
