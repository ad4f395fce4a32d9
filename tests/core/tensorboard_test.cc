#include "core/tensorboard.h"

#include <gtest/gtest.h>

#include <string>

#include "core/file.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

std::string Hex(const std::string& bytes) {
  std::string hex;
  for (const char c : bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    hex += kDigits[static_cast<unsigned char>(c) >> 4];
    hex += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return hex;
}

// Every event file in the world whose first event has 24 bytes begins with these twelve.
constexpr char kFirstRecord[] =
    "1800000000000000a37f4b22"  // length, its checksum
    "090000000000000000"
    "1a0d627261696e2e4576656e743a32"  // wall_time 0, file_version
    "eedf28a3";

TEST(TensorBoard, WritesTheRecordsOfTheFormat) {
  EXPECT_EQ(Hex(EventRecord(VersionEvent(0))), kFirstRecord);
  // wall_time 2, step 300, summary {value {tag "a/loss", simple_value 1.5}}.
  EXPECT_EQ(Hex(ScalarEvent(2, 300, {{"a/loss", 1.5}})),
            "09000000000000004010ac022a0f0a0d0a06612f6c6f7373150000c03f");
  // step 7, session_log {status START}.
  EXPECT_EQ(Hex(StartEvent(0, 7)),
            "0900000000000000001007"
            "3a020801");
}

TEST(TensorBoard, EveryStartHasAFileBehindTheEarlierOnes) {
  const TempDir dir;
  const std::string folder = dir.path() + "/tb";
  for (int start = 0; start < 3; ++start) {
    auto file = EventFile::Create(folder, "host");
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_TRUE(file->Start(start).ok());
    ASSERT_TRUE(file->Write(start, {{"loss", 1.0}}).ok());
  }
  const auto names = ListDirectory(folder);
  ASSERT_TRUE(names.ok());
  ASSERT_EQ(names->size(), 3U);
  for (size_t i = 0; i < 3; ++i) {
    const std::string bytes = ReadFile(folder + "/" + (*names)[i]).value();
    const std::string start = EventRecord(StartEvent(0, static_cast<int64_t>(i)));
    // Behind the version (40 bytes), of the same length; the time differs: length, its checksum.
    EXPECT_EQ(bytes.substr(40, 12), start.substr(0, 12));
    EXPECT_EQ(bytes.substr(40 + 12 + 9, 6), start.substr(12 + 9, 6));
  }
  EXPECT_EQ(ErrorCodeOf(EventFile::Create("/dev/null/tb", "host").status()), "FILE-WRITE");
}

}  // namespace
}  // namespace sala
