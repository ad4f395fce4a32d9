#include "core/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "core/file.h"
#include "core/safetensors_header.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string FileBytes(const std::string& header, const std::string& data) {
  const uint64_t n = header.size();
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &n, 8);
  return bytes + header + data;
}

std::string CodeOf(const std::string& bytes) {
  return ErrorCodeOf(ParseSafetensorsHeader(bytes).status());
}

std::string CodeOf(const std::string& header, const std::string& data) {
  return CodeOf(FileBytes(header, data));
}

TEST(Safetensors, BytesOfAKnownFile) {
  const TempDir dir;
  const std::vector<float> f = {1, 2};
  const std::vector<uint16_t> h = {0x3f80};
  ASSERT_TRUE(
      WriteSafetensors(dir / "x",
                       {{"b", DType::kBF16, {1}, h.data()}, {"z", DType::kF32, {2}, f.data()}}, {})
          .ok());
  std::string header =
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("b":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  EXPECT_EQ(ReadFile(dir / "x").value(),
            FileBytes(header, std::string("\0\0\x80\x3f\0\0\0\x40\x80\x3f", 10)));
  const SafetensorsFile file = SafetensorsFile::Open(dir / "x").value();
  EXPECT_EQ(file.metadata().at("format"), "pt");
  ASSERT_NE(file.Find("z"), nullptr);
  EXPECT_EQ(std::memcmp(file.Data(*file.Find("z")), f.data(), 8), 0);
  EXPECT_EQ(file.Find("nope"), nullptr);
}

TEST(Safetensors, ValidEdges) {
  EXPECT_EQ(CodeOf("{}", ""), "");
  EXPECT_EQ(CodeOf("{}      ", ""), "");
  EXPECT_EQ(CodeOf(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})", "x"), "") << "rank 0";
  EXPECT_EQ(
      CodeOf(
          R"({"a":{"dtype":"U8","shape":[0,5],"data_offsets":[0,0]},"b":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}})",
          "12345678"),
      "");
  for (const char* dtype : {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "U16", "I16", "F16", "BF16",
                            "U32", "I32", "F32", "U64", "I64", "F64"}) {
    const int64_t n = SafetensorsElementBytes(dtype);
    EXPECT_EQ(CodeOf(std::string(R"({"a":{"dtype":")") + dtype +
                         R"(","shape":[1],"data_offsets":[0,)" + std::to_string(n) + "]}}",
                     std::string(static_cast<size_t>(n), 'x')),
              "")
        << dtype;
  }
}

TEST(Safetensors, EveryCheckHasABadFile) {
  const auto tensor = [](const std::string& dtype, const std::string& shape,
                         const std::string& offsets) {
    return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets +
           "}}";
  };
  EXPECT_EQ(CodeOf("1234567"), "ST-HEADER") << "shorter than its length field";
  EXPECT_EQ(CodeOf(std::string(8, '\xff')), "ST-HEADER") << "length above the limit";
  EXPECT_EQ(CodeOf(FileBytes("{}", "").substr(0, 9)), "ST-HEADER") << "length past the end";
  EXPECT_EQ(CodeOf(" {}", ""), "ST-HEADER") << "first byte";
  EXPECT_EQ(CodeOf("", ""), "ST-HEADER") << "empty header";
  EXPECT_EQ(CodeOf("{\"\xff\":1}", ""), "ST-HEADER") << "UTF-8";
  EXPECT_EQ(CodeOf("{", ""), "ST-JSON");
  EXPECT_EQ(CodeOf("{}x", ""), "ST-JSON");
  EXPECT_EQ(CodeOf(R"({"__metadata__":{},"__metadata__":{}})", ""), "ST-DUP");
  EXPECT_EQ(CodeOf(R"({"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}})", "x"),
            "ST-DUP")
      << "inner";
  EXPECT_EQ(CodeOf(R"({"a":{"b":{"c":{"d":{}}}}})", ""), "ST-JSON") << "nesting";
  EXPECT_EQ(CodeOf("{\"a\":" + std::string(100000, '['), ""), "ST-JSON")
      << "nesting must not exhaust the stack";
  EXPECT_EQ(CodeOf(R"({"a":{"dtype":"U8","shape":[]}})", ""), "ST-JSON") << "field missing";
  EXPECT_EQ(CodeOf(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":1}})", "x"), "ST-JSON")
      << "extra field";
  EXPECT_EQ(CodeOf(R"({"a":3})", ""), "ST-JSON");
  EXPECT_EQ(CodeOf(tensor("\"F4\"", "[1]", "[0,1]"), "x"), "ST-DTYPE");
  EXPECT_EQ(CodeOf(tensor("3", "[1]", "[0,1]"), "x"), "ST-DTYPE");
  for (const char* shape :
       {"[-1]", "[1.5]", "[\"1\"]", "3", "[1,1,1,1,1,1,1,1,1]", "[18446744073709551615]",
        "[4294967296,4294967296]", "[4294967296,4294967296,0]"}) {
    EXPECT_EQ(CodeOf(tensor("\"U8\"", shape, "[0,1]"), "x"), "ST-SHAPE") << shape;
  }
  for (const char* offsets :
       {"[1,0]", "[0,2]", "[0]", "[0,1,1]", "[-1,1]", "3", "[0,18446744073709551615]"}) {
    EXPECT_EQ(CodeOf(tensor("\"U8\"", "[1]", offsets), "x"), "ST-OFFSET") << offsets;
  }
  const std::string two =
      R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":)";
  EXPECT_EQ(CodeOf(two + "[2,4]}}", "1234"), "");
  EXPECT_EQ(CodeOf(two + "[1,3]}}", "123"), "ST-GAP") << "overlap";
  EXPECT_EQ(CodeOf(two + "[3,5]}}", "12345"), "ST-GAP") << "gap";
  EXPECT_EQ(CodeOf(two + "[2,4]}}", "12345"), "ST-GAP") << "does not end at the end";
  EXPECT_EQ(CodeOf(tensor("\"U8\"", "[1]", "[1,2]"), "12"), "ST-GAP") << "does not start at 0";
  EXPECT_EQ(CodeOf(tensor("\"F32\"", "[1]", "[0,2]"), "12"), "ST-SIZE");
  EXPECT_EQ(CodeOf(R"({"__metadata__":{"a":1}})", ""), "ST-JSON");
  EXPECT_EQ(CodeOf(R"({"__metadata__":[]})", ""), "ST-JSON");
}

TEST(Safetensors, ErrorsNameTheFile) {
  const TempDir dir;
  ASSERT_TRUE(WriteFileAtomically(dir / "x", "short").ok());
  EXPECT_THAT(MessageOf(SafetensorsFile::Open(dir / "x").status()),
              HasSubstr("ST-HEADER: " + dir / "x"));
}

TEST(SafetensorsModel, ShardsAndTypes) {
  const TempDir dir;
  const std::vector<float> f = {1.5F, -2};
  const std::vector<BF16> h = {BF16(0.25F), BF16(-8.0F)};
  const std::vector<double> d = {1e10};
  const std::vector<SafetensorsTensor> tensors = {{"f", DType::kF32, {2}, f.data()},
                                                  {"h", DType::kBF16, {1, 2}, h.data()},
                                                  {"d", DType::kF64, {1}, d.data()}};
  ASSERT_TRUE(WriteSafetensorsModel(dir.path(), tensors, 12).ok());
  EXPECT_THAT(ListDirectory(dir.path()).value(),
              ElementsAre("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                          "model.safetensors.index.json"));
  EXPECT_THAT(ReadFile(dir / "model.safetensors.index.json").value(),
              HasSubstr("\"total_size\": 20"));
  const SafetensorsModel model = SafetensorsModel::Open(dir.path()).value();
  EXPECT_THAT(model.names(), ElementsAre("d", "f", "h"));
  std::vector<float> out(2);
  ASSERT_TRUE(model.ReadF32("h", {1, 2}, out.data()).ok());
  EXPECT_THAT(out, ElementsAre(0.25F, -8));
  EXPECT_EQ(ErrorCodeOf(model.ReadF32("h", {2}, out.data())), "ST-SHAPE");
  EXPECT_EQ(ErrorCodeOf(model.ReadF32("none", {2}, out.data())), "ST-SHAPE");
  EXPECT_EQ(model.RawBytes("f").value(), std::string(reinterpret_cast<const char*>(f.data()), 8));
  const TempDir one;
  ASSERT_TRUE(WriteSafetensorsModel(one.path(), tensors).ok());
  EXPECT_THAT(ListDirectory(one.path()).value(), ElementsAre("model.safetensors"));
}

TEST(SafetensorsModel, HalfFloats) {
  const TempDir dir;
  const std::vector<uint16_t> halves = {0x3c00, 0xc000, 0x0001, 0x03ff,
                                        0x7bff, 0x7c00, 0x8000, 0x3555};
  std::string data(reinterpret_cast<const char*>(halves.data()), 16);
  ASSERT_TRUE(WriteFileAtomically(
                  dir / "model.safetensors",
                  FileBytes(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", data))
                  .ok());
  std::vector<float> out(8);
  ASSERT_TRUE(SafetensorsModel::Open(dir.path()).value().ReadF32("x", {8}, out.data()).ok());
  EXPECT_THAT(out, ElementsAre(1, -2, 0x1p-24F, 0x1.ff8p-15F, 65504, HUGE_VALF, 0, 0x1.554p-2F));
  EXPECT_TRUE(std::signbit(out[6]));
}

TEST(SafetensorsModel, PathsMustStayInside) {
  const TempDir dir;
  for (const char* name : {"../x", "/x", "", "..", "a/b"}) {
    ASSERT_TRUE(WriteFileAtomically(dir / "model.safetensors.index.json",
                                    std::string(R"({"weight_map":{"t":")") + name + "\"}}")
                    .ok());
    EXPECT_EQ(ErrorCodeOf(SafetensorsModel::Open(dir.path()).status()), "ST-PATH") << name;
  }
  ASSERT_TRUE(WriteFileAtomically(dir / "model.safetensors.index.json", "[]").ok());
  EXPECT_EQ(ErrorCodeOf(SafetensorsModel::Open(dir.path()).status()), "ST-JSON");
}

TEST(SafetensorsModel, PickleIsRefused) {
  const TempDir dir;
  EXPECT_EQ(ErrorCodeOf(SafetensorsModel::Open(dir.path()).status()), "FILE-MISSING");
  ASSERT_TRUE(WriteFileAtomically(dir / "pytorch_model.bin", "x").ok());
  EXPECT_THAT(MessageOf(SafetensorsModel::Open(dir.path()).status()), HasSubstr("pickle"));
}

}  // namespace
}  // namespace sala
