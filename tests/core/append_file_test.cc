#include "core/append_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <string>

#include "core/file.h"
#include "core/metrics.h"
#include "core/tensorboard.h"
#include "nlohmann/json.hpp"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::HasSubstr;

// While it lives no file of this process grows beyond so many bytes: the kernel writes what fits
// and refuses the rest, as on a disk that is full.
class FullDisk {
 public:
  explicit FullDisk(size_t bytes) : before_(::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &limit_);
    const rlimit limit = {bytes, limit_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;
  ~FullDisk() {
    ::setrlimit(RLIMIT_FSIZE, &limit_);
    ::signal(SIGXFSZ, before_);
  }

 private:
  void (*before_)(int);
  rlimit limit_{};
};

TEST(AppendFile, ARecordIsWholeOrNotThere) {
  const TempDir dir;
  const std::string path = dir / "records";
  AppendFile file = AppendFile::Open(path, AppendFile::At::kNew).value();
  EXPECT_EQ(file.last(), 0);
  ASSERT_TRUE(file.Append("first|").ok());
  {
    const FullDisk disk(10);  // four bytes of the next one fit
    const Status status = file.Append("second|");
    EXPECT_EQ(ErrorCodeOf(status), "FILE-WRITE");
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kIo);
    EXPECT_THAT(MessageOf(status), HasSubstr(path));
    EXPECT_EQ(ReadFile(path).value(), "first|");
    EXPECT_FALSE(file.Append("third--|").ok());
    EXPECT_TRUE(file.Append("4|").ok()) << "what fits is written";
  }
  ASSERT_TRUE(file.Append("fifth|").ok());
  EXPECT_EQ(ReadFile(path).value(), "first|4|fifth|");
  EXPECT_EQ(file.last(), '|');
  EXPECT_EQ(ErrorCodeOf(AppendFile::Open(path, AppendFile::At::kNew).status()), "FILE-WRITE");
  AppendFile more = AppendFile::Open(path, AppendFile::At::kEnd).value();
  ASSERT_TRUE(more.Append("6|").ok());
  EXPECT_EQ(ReadFile(path).value(), "first|4|fifth|6|");
}

TEST(AppendFile, MetricsAndEventsGoOnWhenThereIsRoomAgain) {
  const TempDir dir;
  MetricsFile metrics = MetricsFile::Open(dir / "m.jsonl").value();
  ASSERT_TRUE(metrics.Write({{"step", 1}}).ok());
  EventFile events = EventFile::Create(dir / "tb", "host").value();
  {
    const FullDisk disk(20);  // less than the first record of an event file
    EXPECT_EQ(ErrorCodeOf(metrics.Write({{"step", 2}, {"loss", 0.5}})), "FILE-WRITE");
    EXPECT_EQ(ErrorCodeOf(events.Start(7)), "FILE-WRITE");
    EXPECT_EQ(ErrorCodeOf(events.Write(7, {{"loss", 0.5}})), "FILE-WRITE");
  }
  ASSERT_TRUE(metrics.Write({{"step", 3}}).ok());
  EXPECT_EQ(ReadFile(dir / "m.jsonl").value(), "{\"step\":1}\n{\"step\":3}\n");
  ASSERT_TRUE(events.Write(8, {{"loss", 0.25}}).ok());
  const std::string path = dir / ("tb/" + ListDirectory(dir / "tb").value()[0]);
  const auto record_bytes = [](const std::string& event) { return EventRecord(event).size(); };
  const size_t head = record_bytes(VersionEvent(0)) + record_bytes(StartEvent(0, 7));
  const size_t one = record_bytes(ScalarEvent(0, 8, {{"loss", 0.25}}));
  ASSERT_EQ(FileSize(path).value(), static_cast<int64_t>(head + one));
  {
    const FullDisk disk(head + one + one / 2);
    EXPECT_EQ(ErrorCodeOf(events.Write(9, {{"loss", 0.25}})), "FILE-WRITE");
    EXPECT_EQ(FileSize(path).value(), static_cast<int64_t>(head + one)) << "half a record stays";
  }
  ASSERT_TRUE(events.Write(10, {{"loss", 0.125}}).ok());
  // Every record is where the lengths before it say, and of the event that was written.
  const std::string bytes = ReadFile(path).value();
  ASSERT_EQ(bytes.size(), head + 2 * one);
  const std::string last = EventRecord(ScalarEvent(0, 10, {{"loss", 0.125}}));
  EXPECT_EQ(bytes.substr(head + one, 12), last.substr(0, 12)) << "length and its checksum";
  EXPECT_EQ(bytes.substr(head + one + 21, one - 25), last.substr(21, one - 25)) << "step and value";
}

}  // namespace
}  // namespace sala
