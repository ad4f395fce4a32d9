#include "core/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/half.h"
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
  EXPECT_EQ(CodeOf(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},)"
                   R"("a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}})",
                   "x"),
            "ST-DUP")
      << "a tensor twice";
  EXPECT_EQ(CodeOf(R"({"__metadata__":{"x":"1","x":"1"}})", ""), "ST-DUP") << "metadata";
  EXPECT_EQ(CodeOf("[1]", ""), "ST-HEADER") << "no object";
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
  // The product is 2^64, which wraps to 0: as many bytes as the file has.
  EXPECT_EQ(CodeOf(tensor("\"U8\"", "[4294967296,4294967296]", "[0,0]"), ""), "ST-SHAPE");
  EXPECT_EQ(CodeOf(tensor("\"F64\"", "[2305843009213693952]", "[0,0]"), ""), "ST-SHAPE")
      << "only with the element size does it wrap";
  EXPECT_EQ(CodeOf(tensor("\"U8\"", "[2]", "[0,3]"), "123"), "ST-SIZE") << "too many bytes";
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

TEST(Safetensors, OrderIsThatOfTheOfficialLibrary) {
  const TempDir dir;
  const int64_t zero = 0;
  std::vector<SafetensorsTensor> tensors;
  for (const auto& [name, dtype] :
       std::vector<std::pair<std::string, DType>>{{"u8", DType::kU8},
                                                  {"f32", DType::kF32},
                                                  {"bf16", DType::kBF16},
                                                  {"f64", DType::kF64},
                                                  {"i64", DType::kI64},
                                                  {"u16", DType::kU16},
                                                  {"i32", DType::kI32}})
    tensors.push_back({.name = name, .dtype = dtype, .shape = {1}, .data = &zero});
  tensors.push_back(
      {.name = "f16", .dtype = DType::kU16, .shape = {1}, .data = &zero, .type = "F16"});
  tensors.push_back({.name = "f32b", .dtype = DType::kF32, .shape = {}, .data = &zero});
  tensors.push_back({.name = "f32a", .dtype = DType::kF32, .shape = {3, 0}, .data = nullptr});
  ASSERT_TRUE(WriteSafetensors(dir / "x", tensors, {}).ok());
  std::vector<std::string> order;
  const SafetensorsFile file = SafetensorsFile::Open(dir / "x").value();
  for (const SafetensorsEntry& entry : file.entries()) order.push_back(entry.name);
  EXPECT_THAT(order,
              ElementsAre("i64", "f64", "f32", "f32a", "f32b", "i32", "bf16", "f16", "u16", "u8"));
}

TEST(Safetensors, ValuesThatAreNotGivenAreHoles) {
  const TempDir dir;
  const std::vector<float> f = {1, 2};
  constexpr int64_t kElements = int64_t{1} << 34;
  ASSERT_TRUE(WriteSafetensors(dir / "x",
                               {{.name = "a", .dtype = DType::kF32, .shape = {kElements}},
                                {"b", DType::kF32, {2}, f.data()},
                                {.name = "c", .dtype = DType::kBF16, .shape = {2, kElements}}},
                               {})
                  .ok());
  struct stat info {};
  ASSERT_EQ(::stat((dir / "x").c_str(), &info), 0);
  EXPECT_GT(info.st_size, kElements * 8);
  EXPECT_LT(info.st_blocks * 512, 1 << 20) << "the file system stores the holes";
  const SafetensorsFile file = SafetensorsFile::Open(dir / "x").value();
  EXPECT_EQ(file.Find("c")->bytes, kElements * 4);
  EXPECT_EQ(std::string(file.Data(*file.Find("b")), 8), std::string("\0\0\x80\x3f\0\0\0\x40", 8));
  EXPECT_EQ(*file.Data(*file.Find("c")), 0);
}

TEST(Safetensors, AHeaderOfAnotherProgramIsKept) {
  const TempDir dir;
  const std::vector<float> f = {1, 2};
  const std::vector<uint16_t> h = {0x3c00};
  // Another order, spaces, metadata, padding.
  const std::string header =
      R"({ "b":{"shape":[1],"dtype":"F16","data_offsets":[0,2]}, "__metadata__":{"made by":"x"},)"
      R"("a":{"dtype":"F32","shape":[2],"data_offsets":[2,10]}}   )";
  const std::vector<SafetensorsTensor> tensors = {
      {"a", DType::kF32, {2}, f.data()},
      {"unnamed", DType::kF32, {2}, f.data()},
      {.name = "b", .dtype = DType::kU16, .shape = {1}, .data = h.data(), .type = "F16"}};
  ASSERT_TRUE(WriteSafetensorsAs(dir / "x", header, tensors).ok());
  EXPECT_EQ(ReadFile(dir / "x").value(),
            FileBytes(header, std::string("\0\x3c\0\0\x80\x3f\0\0\0\x40", 10)));
  const SafetensorsFile file = SafetensorsFile::Open(dir / "x").value();
  EXPECT_EQ(file.HeaderText(), header);
}

TEST(HalfFloat, EveryOneComesBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = HalfToFloat(static_cast<uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value)))) << bits;
    } else {
      ASSERT_EQ(FloatToHalf(value), bits);
    }
  }
}

TEST(HalfFloat, RoundsToTheNearestTiesToEven) {
  // Between every two neighbours: just below the middle, the middle, just above.
  for (uint32_t below = 0; below < 0x7c00; ++below) {
    const double a = HalfToFloat(static_cast<uint16_t>(below));
    const double b = below == 0x7bff ? 65536.0 : HalfToFloat(static_cast<uint16_t>(below + 1));
    const auto middle = static_cast<float>((a + b) / 2);
    const uint32_t even = below % 2 == 0 ? below : below + 1;
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 0.0F)), below);
    ASSERT_EQ(FloatToHalf(middle), even);
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, HUGE_VALF)), below + 1);
    ASSERT_EQ(FloatToHalf(-middle), even | 0x8000U);
  }
  EXPECT_EQ(FloatToHalf(HUGE_VALF), 0x7c00);
  EXPECT_EQ(FloatToHalf(1e30F), 0x7c00);
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

TEST(SafetensorsModel, BoxesAreWhatTheWholeTensorHolds) {
  const TempDir dir;
  std::vector<BF16> h;
  h.reserve(35);
  for (int i = 0; i < 35; ++i) h.emplace_back(static_cast<float>(i));
  ASSERT_TRUE(WriteSafetensorsModel(dir.path(), {{"m", DType::kBF16, {5, 7}, h.data()},
                                                 {"v", DType::kBF16, {35}, h.data()}})
                  .ok());
  const SafetensorsModel model = SafetensorsModel::Open(dir.path()).value();
  for (const auto& [offset, box] :
       std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>{{{0, 0}, {5, 7}},
                                                                          {{2, 0}, {3, 7}},
                                                                          {{0, 3}, {5, 2}},
                                                                          {{1, 6}, {3, 1}},
                                                                          {{4, 1}, {1, 5}}}) {
    std::vector<float> whole;
    for (int64_t r = 0; r < box[0]; ++r) {
      for (int64_t c = 0; c < box[1]; ++c)
        whole.push_back(static_cast<float>((offset[0] + r) * 7 + offset[1] + c));
    }
    const auto n = static_cast<int64_t>(whole.size());
    for (int64_t begin = 0; begin <= n; ++begin) {
      for (int64_t end = begin; end <= n; ++end) {
        std::vector<float> part(static_cast<size_t>(end - begin));
        ASSERT_TRUE(model.ReadBoxF32("m", {5, 7}, offset, box, begin, end, part.data()).ok());
        ASSERT_EQ(part, std::vector<float>(whole.begin() + begin, whole.begin() + end));
      }
    }
  }
  std::vector<float> part(4);
  ASSERT_TRUE(model.ReadBoxF32("v", {35}, {10}, {20}, 3, 7, part.data()).ok());
  EXPECT_THAT(part, ElementsAre(13, 14, 15, 16));
}

// A folder of two files with one tensor each, and an index to be spoilt.
class IndexTest : public testing::Test {
 protected:
  IndexTest() {
    EXPECT_TRUE(
        WriteSafetensors(dir_ / "1.safetensors", {{"a", DType::kF32, {2}, f_.data()}}, {}).ok());
    EXPECT_TRUE(
        WriteSafetensors(dir_ / "2.safetensors", {{"b", DType::kF32, {1}, f_.data()}}, {}).ok());
  }
  Status Open(const std::string& index) {
    EXPECT_TRUE(WriteFileAtomically(dir_ / "model.safetensors.index.json", index).ok());
    return SafetensorsModel::Open(dir_.path()).status();
  }
  std::string Code(const std::string& index) { return ErrorCodeOf(Open(index)); }

  const TempDir dir_;
  const std::vector<float> f_ = {1, 2};
};

TEST_F(IndexTest, EveryCheckHasABadIndex) {
  const std::string good = R"("weight_map":{"a":"1.safetensors","b":"2.safetensors"})";
  EXPECT_EQ(Code("{" + good + "}"), "");
  EXPECT_EQ(Code(R"({"metadata":{"total_size":12},)" + good + "}"), "");
  EXPECT_EQ(Code(R"({"metadata":{"total_size":12.0,"format":"pt"},)" + good + "}"), "");
  for (const char* total : {"13", "0", "-12", "12.5", "\"12\"", "1e300", "[]"}) {
    EXPECT_EQ(Code(std::string(R"({"metadata":{"total_size":)") + total + "}," + good + "}"),
              "ST-SIZE")
        << total;
  }
  for (const char* text : {"[]", "{", "", "3", "{}", R"({"weight_map":[]})", "{\"\xff\":1}"})
    EXPECT_EQ(Code(text), "ST-JSON") << text;
  EXPECT_EQ(Code(R"({"metadata":null,)" + good + "}"), "");
  for (const char* metadata : {"[]", "[3]", "\"12\"", "3"}) {
    EXPECT_EQ(Code(std::string(R"({"metadata":)") + metadata + "," + good + "}"), "ST-JSON")
        << metadata;
  }
  EXPECT_EQ(Code(R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors","a":"1.safetensors"}})"),
            "ST-DUP");
  EXPECT_EQ(Code("{" + good + "," + good + "}"), "ST-DUP");
  for (const char* name : {"../1.safetensors", "/1.safetensors", "", ".", "..", ".safetensors",
                           "x/1.safetensors", "x\\\\1.safetensors", "1", "tokenizer.model"}) {
    EXPECT_EQ(Code(std::string(R"({"weight_map":{"b":"2.safetensors","a":")") + name + "\"}}"),
              "ST-PATH")
        << name;
  }
  EXPECT_EQ(Code(R"({"weight_map":{"a":1,"b":"2.safetensors"}})"), "ST-PATH") << "no text";
  EXPECT_EQ(Code(R"({"weight_map":{"a":"1.safetensors","b":"3.safetensors"}})"), "ST-PATH")
      << "a file that is not here";
  EXPECT_EQ(Code(R"({"weight_map":{"a":"2.safetensors","b":"2.safetensors"}})"), "ST-PATH")
      << "not in that file";
  EXPECT_EQ(Code(R"({"weight_map":{"a":"1.safetensors","b":"2.safetensors","c":"2.safetensors"}})"),
            "ST-PATH")
      << "in no file";
  EXPECT_EQ(Code(R"({"weight_map":{"a":"1.safetensors"}})"), "")
      << "a file that the index does not name";
  ASSERT_TRUE(
      WriteSafetensors(dir_ / "2.safetensors",
                       {{"b", DType::kF32, {1}, f_.data()}, {"a", DType::kF32, {2}, f_.data()}}, {})
          .ok());
  const Status twice = Open("{" + good + "}");
  EXPECT_EQ(ErrorCodeOf(twice), "ST-PATH") << "a tensor in two files";
  EXPECT_THAT(MessageOf(twice), HasSubstr("/2.safetensors: holds tensor `a`"));
  ASSERT_TRUE(WriteFileAtomically(dir_ / "2.safetensors", "short").ok());
  EXPECT_EQ(Code("{" + good + "}"), "ST-HEADER") << "a bad file";
}

TEST(SafetensorsModel, OtherFormsOfWeightsAreRefused) {
  for (const char* name : {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
                           "consolidated.00.pth", "weights.pt", "model-q4_0.gguf"}) {
    const TempDir dir;
    EXPECT_EQ(ErrorCodeOf(SafetensorsModel::Open(dir.path()).status()), "FILE-MISSING");
    ASSERT_TRUE(WriteFileAtomically(dir / name, "x").ok());
    const Status refused = SafetensorsModel::Open(dir.path()).status();
    EXPECT_EQ(ErrorCodeOf(refused), "ST-FORMAT") << name;
    EXPECT_THAT(MessageOf(refused), HasSubstr(name));
    // Beside safetensors they are not looked at.
    ASSERT_TRUE(WriteSafetensors(dir / "model.safetensors", {}, {}).ok());
    EXPECT_TRUE(SafetensorsModel::Open(dir.path()).ok()) << name;
  }
}

}  // namespace
}  // namespace sala
