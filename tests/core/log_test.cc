#include "core/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/file.h"
#include "core/metrics.h"
#include "core/progress.h"
#include "core/terminal.h"
#include "nlohmann/json.hpp"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

std::string Captured(const std::function<void()>& body) {
  ::testing::internal::CaptureStderr();
  body();
  return ::testing::internal::GetCapturedStderr();
}

TEST(Log, LinesAndLevels) {
  SetLogIdentity(0, "node1");
  EXPECT_THAT(Captured([] { SALA_LOG(Info) << "step " << 3; }),
              MatchesRegex("[0-9][0-9]:[0-9][0-9]:[0-9][0-9] info step 3\n"));
  EXPECT_THAT(Captured([] { SALA_LOG(Warn) << "slow"; }),
              MatchesRegex("[0-9:]+ warn \\[rank 0@node1\\] slow\n"));
  EXPECT_EQ(Captured([] { SALA_LOG(Debug) << "x"; }), "");
  SetLogIdentity(3, "node2");
  EXPECT_EQ(Captured([] { SALA_LOG(Info) << "x"; }), "");
  EXPECT_THAT(Captured([] { SALA_LOG(Error) << "x"; }), HasSubstr(" error [rank 3@node2] x\n"));
  SetLogIdentity(0, "");
}

TEST(Log, QuietLeavesWarningsAndTheFile) {
  const TempDir dir;
  ASSERT_TRUE(OpenLogFile(dir / "log").ok());
  SetQuiet(true);
  EXPECT_EQ(Captured([] { SALA_LOG(Info) << "x"; }), "");
  EXPECT_THAT(Captured([] { SALA_LOG(Warn) << "slow"; }), HasSubstr("slow"));
  EXPECT_EQ(Captured([] {
              ProgressDisplay display("stage", 2, /*enabled=*/true);
              display.Update(1, "loss 3");
            }),
            "");
  SetQuiet(false);
  EXPECT_THAT(ReadFile(dir / "log").value(), HasSubstr(" info x\n"));
  ASSERT_TRUE(OpenLogFile("/dev/null").ok());
}

TEST(Log, ColourOfLevels) {
  const TempDir dir;
  ASSERT_TRUE(OpenLogFile(dir / "log").ok());
  SetColourMode(ColourMode::kAlways);
  EXPECT_THAT(Captured([] { SALA_LOG(Warn) << "slow"; }), HasSubstr(" \x1b[33mwarn\x1b[0m ["));
  EXPECT_THAT(Captured([] { SALA_LOG(Info) << "step"; }), HasSubstr(" info step\n"));
  // A file is no terminal.
  SetColourMode(ColourMode::kAuto);
  EXPECT_THAT(Captured([] { SALA_LOG(Error) << "lost"; }), HasSubstr(" error ["));
  EXPECT_THAT(ReadFile(dir / "log").value(), Not(HasSubstr("\x1b")));
  ASSERT_TRUE(OpenLogFile("/dev/null").ok());
}

TEST(Log, FileIsAppendedToAndReopened) {
  const TempDir dir;
  ASSERT_TRUE(OpenLogFile(dir / "log").ok());
  Captured([] { SALA_LOG(Info) << "one"; });
  ASSERT_TRUE(RenamePath(dir / "log", dir / "log.1").ok());
  Captured([] { SALA_LOG(Debug) << "two"; });
  ReopenLogFile();
  Captured([] { SALA_LOG(Info) << "three"; });
  EXPECT_THAT(ReadFile(dir / "log.1").value(), HasSubstr(" info one\n"));
  EXPECT_THAT(ReadFile(dir / "log.1").value(), HasSubstr(" debug two\n"));
  EXPECT_THAT(ReadFile(dir / "log").value(), MatchesRegex("[0-9-]+ [0-9:]+ info three\n"));
  EXPECT_EQ(ErrorCodeOf(OpenLogFile(dir / "no/such/log")), "FILE-WRITE");
  ASSERT_TRUE(OpenLogFile("/dev/null").ok());
}

TEST(Log, StatusLineStaysBelow) {
  const std::string text = Captured([] {
    SetStatusLine("STATUS");
    PrintPlainLine("line");
    KeepStatusLine();
    PrintPlainLine("after");
  });
  EXPECT_EQ(text, "\r\x1b[KSTATUS\r\x1b[Kline\nSTATUS\nafter\n");
}

TEST(Metrics, OneObjectALine) {
  const TempDir dir;
  {
    MetricsFile metrics = MetricsFile::Open(dir / "m.jsonl").value();
    ASSERT_TRUE(metrics.Write({{"step", 1}, {"loss", 0.5}}).ok());
    EXPECT_EQ(ReadFile(dir / "m.jsonl").value(), "{\"step\":1,\"loss\":0.5}\n")
        << "flushed, keys in order";
    ASSERT_TRUE(metrics.Write({{"text", "\xff"}}).ok()) << "bad UTF-8 is replaced";
  }
  const std::string before = ReadFile(dir / "m.jsonl").value();
  ASSERT_TRUE(WriteFileAtomically(dir / "m.jsonl", before + "{\"half").ok());
  MetricsFile metrics = MetricsFile::Open(dir / "m.jsonl").value();
  ASSERT_TRUE(metrics.Write({{"step", 2}}).ok());
  EXPECT_EQ(ReadFile(dir / "m.jsonl").value(), before + "{\"half\n{\"step\":2}\n");
  EXPECT_EQ(ErrorCodeOf(MetricsFile::Open(dir / "no/m").status()), "FILE-WRITE");
}

TEST(Metrics, FullDiskIsAnError) {
  MetricsFile metrics = MetricsFile::Open("/dev/full").value();
  EXPECT_EQ(ErrorCodeOf(metrics.Write({{"step", 2}})), "FILE-WRITE");
}

TEST(Metrics, HexFloatIsExact) {
  EXPECT_EQ(HexFloat(1.5), "0x1.8p+0");
  for (double x : {0.1, 1.0 / 3, -2.5e-300})
    EXPECT_EQ(std::strtod(HexFloat(x).c_str(), nullptr), x);
}

TEST(Progress, Durations) {
  EXPECT_EQ(DurationText(-1), "-");
  EXPECT_EQ(DurationText(7), "0:07");
  EXPECT_EQ(DurationText(754), "12:34");
  EXPECT_EQ(DurationText(3 * 3600 + 5 * 60 + 9), "3:05:09");
  EXPECT_EQ(DurationText(2 * 86400 + 3 * 3600 + 5 * 60), "2d 03:05");
}

TEST(Progress, LineFitsTheWidth) {
  ProgressState state{"stable 3/9", 420, 1000, "loss 3.214  lr 1.2e-3", 754};
  const std::string wide = ProgressLine(state, 120);
  EXPECT_EQ(
      wide,
      "stable 3/9 [##########..............]  42%  420/1000  left 12:34  loss 3.214  lr 1.2e-3");
  for (int width = 0; width <= 100; ++width) {
    EXPECT_LE(ProgressLine(state, width).size(), static_cast<size_t>(width));
  }
  EXPECT_THAT(ProgressLine(state, 60), Not(HasSubstr("#"))) << "the bar goes first";
  EXPECT_THAT(ProgressLine(state, 60), StartsWith("stable 3/9  42%  420/1000  left 12:34  loss"));
  state.done = 999;
  EXPECT_THAT(ProgressLine(state, 120), HasSubstr(" 99% ")) << "100% only when done";
  state.done = state.total = 0;
  EXPECT_THAT(ProgressLine(state, 120), HasSubstr("100%"));
}

TEST(Progress, WithoutATerminalAFirstAndALastLine) {
  const std::string text = Captured([] {
    ProgressDisplay progress("stage", 100, true);
    for (int64_t i = 1; i <= 100; ++i) progress.Update(i, "loss " + std::to_string(i));
  });
  EXPECT_THAT(text, HasSubstr("stage 1/100 (1%)  left -  loss 1\n"));
  EXPECT_THAT(text, HasSubstr("stage 100/100 (100%)  left 0:00  loss 100\n"));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  EXPECT_THAT(text, Not(HasSubstr("\r")));
  EXPECT_EQ(Captured([] { ProgressDisplay("stage", 100, false).Update(1, "x"); }), "");
}

}  // namespace
}  // namespace sala
