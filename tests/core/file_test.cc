#include "core/file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>

#include "core/utf8.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(File, WriteReadAndSize) {
  const TempDir dir;
  const std::string bytes("a\0b\n", 4);
  ASSERT_TRUE(WriteFileAtomically(dir / "x", bytes).ok());
  EXPECT_EQ(ReadFile(dir / "x").value(), bytes);
  EXPECT_EQ(FileSize(dir / "x").value(), 4);
  ASSERT_TRUE(WriteFileAtomically(dir / "x", "").ok());
  EXPECT_EQ(ReadFile(dir / "x").value(), "");
  EXPECT_THAT(ListDirectory(dir.path()).value(), ElementsAre("x")) << "no temporary file may stay";
}

TEST(File, ReadsFilesWithoutASize) {
  EXPECT_THAT(ReadFile("/proc/self/status").value(), HasSubstr("Pid:"));
}

TEST(File, MissingAndUnreadableFilesAreToldApart) {
  const TempDir dir;
  const Status missing = ReadFile(dir / "none").status();
  EXPECT_EQ(ErrorCodeOf(missing), "FILE-MISSING");
  EXPECT_EQ(ExitCodeOf(missing), ExitCode::kNoInput);
  EXPECT_THAT(MessageOf(missing), HasSubstr(dir / "none"));
  const Status directory = ReadFile(dir.path()).status();
  EXPECT_EQ(ErrorCodeOf(directory), "FILE-READ");
  EXPECT_EQ(ExitCodeOf(directory), ExitCode::kIo);
  EXPECT_EQ(ErrorCodeOf(FileSize(dir / "none").status()), "FILE-MISSING");
  EXPECT_EQ(ErrorCodeOf(ListDirectory(dir / "none").status()), "FILE-MISSING");
}

TEST(File, WriteErrorsNameThePath) {
  const TempDir dir;
  ASSERT_TRUE(WriteFileAtomically(dir / "file", "x").ok());
  for (const Status& status :
       {WriteFileAtomically(dir / "file/below", "x"), MakeDirectories(dir / "file/below"),
        FsyncFile(dir / "none"), RenamePath(dir / "none", dir / "to")}) {
    EXPECT_EQ(ErrorCodeOf(status), "FILE-WRITE");
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kIo);
    EXPECT_THAT(MessageOf(status), HasSubstr(dir.path()));
  }
}

TEST(File, AFullDiskIsAnErrorNotATornFile) {
  // /dev/full answers ENOSPC to every write.
  const TempDir dir;
  std::filesystem::create_symlink("/dev/full", dir / "x.tmp");
  ASSERT_FALSE(PathExists(dir / "x"));
  const Status status = WriteFileAtomically(dir / "x", "hello");
  EXPECT_EQ(ErrorCodeOf(status), "FILE-WRITE");
  EXPECT_THAT(MessageOf(status), HasSubstr("No space left"));
  EXPECT_FALSE(PathExists(dir / "x"));
}

TEST(File, DirectoriesAndRemoval) {
  const TempDir dir;
  ASSERT_TRUE(MakeDirectories(dir / "a/b/c").ok());
  EXPECT_TRUE(MakeDirectories(dir / "a/b/c").ok()) << "existing is fine";
  EXPECT_TRUE(IsDirectory(dir / "a/b"));
  EXPECT_FALSE(IsDirectory(dir / "a/x"));
  EXPECT_TRUE(FsyncDirectory(dir / "a").ok());
  ASSERT_TRUE(RenamePath(dir / "a/b", dir / "d").ok());
  EXPECT_TRUE(PathExists(dir / "d/c"));
  ASSERT_TRUE(RemoveTree(dir / "d").ok());
  EXPECT_FALSE(PathExists(dir / "d"));
  EXPECT_TRUE(RemoveTree(dir / "d").ok()) << "absent is fine";
  EXPECT_GT(FreeBytes(dir.path()).value(), 0);
}

TEST(File, ReadAtReadsAllOrFails) {
  const TempDir dir;
  ASSERT_TRUE(WriteFileAtomically(dir / "x", "0123456789").ok());
  std::array<char, 4> bytes{};
  ASSERT_TRUE(ReadAt(dir / "x", 6, bytes.data(), 4).ok());
  EXPECT_EQ(std::string(bytes.data(), 4), "6789");
  const Status status = ReadAt(dir / "x", 7, bytes.data(), 4);
  EXPECT_EQ(ErrorCodeOf(status), "FILE-READ");
  EXPECT_THAT(MessageOf(status), HasSubstr("ends early"));
}

TEST(MappedFile, MapsAndMoves) {
  const TempDir dir;
  ASSERT_TRUE(WriteFileAtomically(dir / "x", "0123456789").ok());
  ASSERT_TRUE(WriteFileAtomically(dir / "empty", "").ok());
  MappedFile map = MappedFile::Open(dir / "x").value();
  MappedFile moved = std::move(map);
  EXPECT_EQ(std::string(moved.data(), moved.size()), "0123456789");
  moved = MappedFile::Open(dir / "empty").value();
  EXPECT_EQ(moved.size(), 0U);
  EXPECT_EQ(ErrorCodeOf(MappedFile::Open(dir / "none").status()), "FILE-MISSING");
}

TEST(Printable, EscapesAndCuts) {
  EXPECT_EQ(Printable("plain \xc3\xa9"), "plain \xc3\xa9");
  EXPECT_EQ(Printable("a\nb\tc\x1b[1m"), "a\\nb\\tc\\x1b[1m");
  EXPECT_EQ(Printable("\xff"), "\\xff");
  EXPECT_EQ(Printable("\xc2\x9b"), "\\xc2\\x9b") << "U+009B starts terminal commands";
  const std::string cut = Printable(std::string(1000, 'x'));
  EXPECT_LE(cut.size(), 200U);
  EXPECT_THAT(cut, ::testing::EndsWith("..."));
}

TEST(Utf8, WellFormedSequencesOnly) {
  for (const char* good :
       {"", "a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf"}) {
    EXPECT_TRUE(IsValidUtf8(good)) << Printable(good);
  }
  for (const char* bad :
       {"\x80", "\xc3", "\xc0\xaf", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf",
        "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xe2\x82", "\xff"}) {
    EXPECT_FALSE(IsValidUtf8(bad)) << Printable(bad);
  }
}

}  // namespace
}  // namespace sala
