#include "core/hdf5.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

#include "core/file.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<uint16_t> AllBF16Patterns() {
  std::vector<uint16_t> patterns(65536);
  std::iota(patterns.begin(), patterns.end(), uint16_t{0});
  return patterns;
}

void WriteSample(const std::string& path) {
  const std::vector<uint8_t> bytes = {1, 2, 3};
  const std::vector<uint64_t> offsets = {0, 5, uint64_t{1} << 63};
  const std::vector<float> floats = {1.5F, -2, 3, 4, 5, 6};
  Hdf5Writer file = Hdf5Writer::Create(path).value();
  ASSERT_TRUE(file.WriteAttribute("format", "sample").ok());
  ASSERT_TRUE(file.WriteAttribute("empty", "").ok());
  ASSERT_TRUE(file.WriteAttribute("version", int64_t{-7}).ok());
  ASSERT_TRUE(file.WriteDataset("bytes", Hdf5Type::kU8, {3}, bytes.data()).ok());
  ASSERT_TRUE(file.WriteDataset("/crc/offsets", Hdf5Type::kU64, {3}, offsets.data()).ok());
  ASSERT_TRUE(file.WriteDataset("/crc/deep/floats", Hdf5Type::kF32, {2, 3}, floats.data()).ok());
  ASSERT_TRUE(file.WriteDataset("none", Hdf5Type::kI64, {0}, nullptr).ok());
  ASSERT_TRUE(
      file.WriteDataset("a.b.c#0", Hdf5Type::kBF16, {256, 256}, AllBF16Patterns().data()).ok());
  EXPECT_GT(file.Offset("bytes").value(), 0);
  EXPECT_EQ(file.Offset("none").value(), 0);
  ASSERT_TRUE(file.Close().ok());
}

TEST(Hdf5, RoundTrip) {
  const TempDir dir;
  WriteSample(dir / "x.h5");
  const Hdf5Reader file = Hdf5Reader::Open(dir / "x.h5").value();
  EXPECT_EQ(file.StringAttribute("format").value(), "sample");
  EXPECT_EQ(file.StringAttribute("empty").value(), "");
  EXPECT_EQ(file.IntAttribute("version").value(), -7);
  EXPECT_THAT(file.Datasets().value(),
              ElementsAre("a.b.c#0", "bytes", "crc/deep/floats", "crc/offsets", "none"));
  EXPECT_THAT(file.ReadVector<uint8_t>("bytes", Hdf5Type::kU8).value(), ElementsAre(1, 2, 3));
  EXPECT_THAT(file.ReadVector<uint64_t>("crc/offsets", Hdf5Type::kU64).value(),
              ElementsAre(0U, 5U, uint64_t{1} << 63));
  EXPECT_TRUE(file.ReadVector<int64_t>("none", Hdf5Type::kI64).value().empty());
  std::vector<float> floats(6);
  ASSERT_TRUE(file.Read("crc/deep/floats", Hdf5Type::kF32, floats.data(), 24).ok());
  EXPECT_THAT(floats, ElementsAre(1.5F, -2, 3, 4, 5, 6));
}

TEST(Hdf5, DatasetsAreContiguousAlignedAndReadableWithoutTheLibrary) {
  const TempDir dir;
  WriteSample(dir / "x.h5");
  const Hdf5Reader file = Hdf5Reader::Open(dir / "x.h5").value();
  for (const char* name : {"bytes", "crc/offsets", "crc/deep/floats", "a.b.c#0"}) {
    const auto info = file.Info(name).value();
    EXPECT_TRUE(info.contiguous) << name;
    EXPECT_EQ(info.byte_offset % 4096, 0) << name;
  }
  const auto info = file.Expect("a.b.c#0", Hdf5Type::kBF16, {256, -1}).value();
  std::vector<uint16_t> patterns(65536);
  ASSERT_TRUE(ReadAt(dir / "x.h5", info.byte_offset, patterns.data(), 131072).ok());
  EXPECT_EQ(patterns, AllBF16Patterns());
  std::fill(patterns.begin(), patterns.end(), uint16_t{0});
  ASSERT_TRUE(file.Read("a.b.c#0", Hdf5Type::kBF16, patterns.data(), info.bytes).ok());
  EXPECT_EQ(patterns, AllBF16Patterns());
}

TEST(Hdf5, SameContentGivesSameBytes) {
  const TempDir dir;
  WriteSample(dir / "x.h5");
  // HDF5 would note the second in which a file or group was made.
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  WriteSample(dir / "y.h5");
  EXPECT_EQ(ReadFile(dir / "x.h5").value(), ReadFile(dir / "y.h5").value());
}

TEST(Hdf5, EveryTypeIsRecognised) {
  const TempDir dir;
  const std::array<Hdf5Type, 9> types = {Hdf5Type::kU8,  Hdf5Type::kU16, Hdf5Type::kU32,
                                         Hdf5Type::kU64, Hdf5Type::kI32, Hdf5Type::kI64,
                                         Hdf5Type::kF32, Hdf5Type::kF64, Hdf5Type::kBF16};
  const uint64_t zero = 0;
  Hdf5Writer writer = Hdf5Writer::Create(dir / "x.h5", 4096).value();
  for (Hdf5Type type : types) {
    ASSERT_TRUE(writer.WriteDataset(std::string(NameOf(type)), type, {1}, &zero).ok());
  }
  ASSERT_TRUE(writer.Close().ok());
  const Hdf5Reader file = Hdf5Reader::Open(dir / "x.h5").value();
  for (Hdf5Type type : types) {
    const auto info = file.Info(std::string(NameOf(type))).value();
    EXPECT_EQ(info.type, type) << NameOf(type);
    EXPECT_EQ(info.bytes, static_cast<int64_t>(SizeOf(type)));
  }
}

TEST(Hdf5, ErrorsNamePathAndObject) {
  const TempDir dir;
  WriteSample(dir / "x.h5");
  const Hdf5Reader file = Hdf5Reader::Open(dir / "x.h5").value();
  EXPECT_FALSE(file.HasDataset("nope"));
  EXPECT_FALSE(file.HasAttribute("nope"));
  std::array<char, 8> buffer{};
  for (const Status& status :
       {file.Info("nope").status(), file.StringAttribute("nope").status(),
        file.StringAttribute("version").status(), file.IntAttribute("format").status(),
        file.Expect("bytes", Hdf5Type::kU16, {3}).status(),
        file.Expect("bytes", Hdf5Type::kU8, {4}).status(),
        file.Read("bytes", Hdf5Type::kU8, buffer.data(), 4)}) {
    EXPECT_EQ(ErrorCodeOf(status), "HDF5-FORMAT");
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kData);
    EXPECT_THAT(MessageOf(status), HasSubstr(dir / "x.h5"));
  }
  EXPECT_THAT(MessageOf(file.Expect("bytes", Hdf5Type::kU8, {4}).status()),
              HasSubstr("found u8 [3], expected u8 [4]"));
  EXPECT_EQ(ErrorCodeOf(Hdf5Reader::Open(dir / "none").status()), "FILE-MISSING");
  ASSERT_TRUE(WriteFileAtomically(dir / "text", "not hdf5").ok());
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(ErrorCodeOf(Hdf5Reader::Open(dir / "text").status()), "HDF5-FORMAT");
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "") << "the library must not print";
  EXPECT_EQ(ErrorCodeOf(Hdf5Writer::Create(dir / "no/such/x.h5").status()), "FILE-WRITE");
}

TEST(Hdf5, ADatasetCannotBeWrittenTwice) {
  const TempDir dir;
  Hdf5Writer writer = Hdf5Writer::Create(dir / "x.h5").value();
  const uint8_t zero = 0;
  ASSERT_TRUE(writer.WriteDataset("twice", Hdf5Type::kU8, {1}, &zero).ok());
  const Status status = writer.WriteDataset("twice", Hdf5Type::kU8, {1}, &zero);
  EXPECT_EQ(ErrorCodeOf(status), "FILE-WRITE");
  EXPECT_THAT(MessageOf(status), HasSubstr("`twice`"));
}

TEST(Hdf5, AFlippedByteInTheSuperblockIsFound) {
  const TempDir dir;
  WriteSample(dir / "x.h5");
  std::string bytes = ReadFile(dir / "x.h5").value();
  bytes[20] = static_cast<char>(bytes[20] ^ 1);
  ASSERT_TRUE(WriteFileAtomically(dir / "x.h5", bytes).ok());
  EXPECT_EQ(ErrorCodeOf(Hdf5Reader::Open(dir / "x.h5").status()), "HDF5-FORMAT");
}

}  // namespace
}  // namespace sala
