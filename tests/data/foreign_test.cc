// Stores made from stores, and from Megatron's files.
#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>

#include "core/file.h"
#include "data/commands.h"
#include "data/megatron.h"
#include "data/shuffle.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

struct Read {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  uint64_t hash;
  std::string source;
  bool operator==(const Read&) const = default;
  bool operator<(const Read& o) const {
    return std::tie(hash, tokens, mask, source) < std::tie(o.hash, o.tokens, o.mask, o.source);
  }
};

std::vector<Read> Documents(const std::string& directory) {
  std::vector<Read> out;
  auto store = Value(TokenStore::Open(directory));
  for (int64_t f = 0; f < store->files(); ++f) {
    TokenFile* file = Value(store->File(f));
    for (int64_t d = 0; d < file->documents(); ++d) {
      Read read;
      read.tokens.resize(static_cast<size_t>(file->length(d)));
      EXPECT_TRUE(file->CopyTokens(file->begin(d), file->length(d), read.tokens.data()).ok());
      if (store->info().sft()) {
        read.mask.resize(read.tokens.size());
        EXPECT_TRUE(file->CopyMask(file->begin(d), file->length(d), read.mask.data()).ok());
      }
      read.hash = file->hash(d);
      read.source = store->info().sources[static_cast<size_t>(file->source(d))].name;
      out.push_back(std::move(read));
    }
  }
  return out;
}

std::vector<int64_t> Lengths(int count) {
  std::vector<int64_t> lengths;
  lengths.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) lengths.push_back(1 + i * 37 % 200);
  return lengths;
}

TEST(Shuffle, KeepsEveryDocumentInAnOrderThatOnlyTheSeedDecides) {
  TempDir dir;
  MakeStore(dir / "in", Lengths(300), /*shard_tokens=*/5000, /*sft=*/true);
  ShuffleOptions options{.input = dir / "in", .output = dir / "a", .seed = 5};
  const DatasetInfo a = Value(ShuffleDataset(options));
  options.output = dir / "b";
  options.memory_bytes = 3000;  // some fifty buckets
  const DatasetInfo b = Value(ShuffleDataset(options));
  EXPECT_EQ(a.fingerprint, b.fingerprint);
  EXPECT_FALSE(PathExists(dir / "b/shuffle.buckets"));
  options.output = dir / "c";
  options.seed = 6;
  Value(ShuffleDataset(options));

  auto in = Documents(dir / "in");
  auto out = Documents(dir / "a");
  EXPECT_NE(out, in);
  EXPECT_NE(out, Documents(dir / "c"));
  // A random order leaves a few of 300 documents where they were.
  int stayed = 0;
  for (size_t i = 0; i < in.size(); ++i) stayed += in[i] == out[i] ? 1 : 0;
  EXPECT_LT(stayed, 10);
  std::sort(in.begin(), in.end());
  std::sort(out.begin(), out.end());
  EXPECT_EQ(out, in);
  EXPECT_THAT(Value(DescribeDataset(dir / "in")), ::testing::HasSubstr("shuffled     no"));
  EXPECT_THAT(Value(DescribeDataset(dir / "a")), ::testing::HasSubstr("shuffled     yes"));
  const auto json = nlohmann::json::parse(Value(DescribeDataset(dir / "a", /*as_json=*/true)));
  EXPECT_EQ(json["ingest"]["shuffled"], true);
  EXPECT_EQ(json["ingest"]["seed"], 5);
  EXPECT_EQ(json["fingerprint"], a.fingerprint);
}

TEST(Shuffle, TheOrderOfTheInputDoesNotShow) {
  TempDir dir;
  MakeStore(dir / "x", {5, 9, 4});
  MakeStore(dir / "y", {12, 3});
  Value(MergeDatasets({.inputs = {dir / "x", dir / "y"}, .output = dir / "xy", .name = "m"}));
  Value(MergeDatasets({.inputs = {dir / "y", dir / "x"}, .output = dir / "yx", .name = "m"}));
  EXPECT_NE(Documents(dir / "xy"), Documents(dir / "yx"));
  Value(ShuffleDataset({.input = dir / "xy", .output = dir / "a"}));
  Value(ShuffleDataset({.input = dir / "yx", .output = dir / "b"}));
  EXPECT_EQ(Documents(dir / "a"), Documents(dir / "b"));
}

TEST(Shuffle, CopiesOfATextDoNotComeTogether) {
  TempDir dir;
  MakeStore(dir / "in", Lengths(200));
  // The store ten times: of each document ten copies.
  const std::vector<std::string> ten(10, dir / "in");
  Value(MergeDatasets({.inputs = ten, .output = dir / "ten", .name = "m"}));
  ShuffleOptions options{.input = dir / "ten", .output = dir / "a", .seed = 5};
  const DatasetInfo a = Value(ShuffleDataset(options));
  options.output = dir / "b";
  options.memory_bytes = 20000;  // some fifty buckets, and buffers that are written early
  EXPECT_EQ(Value(ShuffleDataset(options)).fingerprint, a.fingerprint);
  auto in = Documents(dir / "ten");
  auto out = Documents(dir / "a");
  // Of 2000 documents in a random order 9 in 1999 stand behind a copy of theirs: nine or so.
  int behind_a_copy = 0;
  for (size_t i = 1; i < out.size(); ++i) behind_a_copy += out[i] == out[i - 1] ? 1 : 0;
  EXPECT_LT(behind_a_copy, 30);
  std::sort(in.begin(), in.end());
  std::sort(out.begin(), out.end());
  EXPECT_EQ(out, in);
}

TEST(Shuffle, WhatItRefuses) {
  TempDir dir;
  MakeStore(dir / "in", {5, 6});
  ExpectError(ShuffleDataset({.input = dir / "nothing", .output = dir / "a"}).status(),
              "DS-MISSING", ExitCode::kNoInput);
  ExpectError(ShuffleDataset({.input = dir / "in", .output = dir / "in"}).status(), "DS-EXISTS",
              ExitCode::kIo);
  ExpectError(ShuffleDataset({.input = dir / "in", .output = dir / "a", .name = "a/b"}).status(),
              "ING-NAME", ExitCode::kUsage);
}

TEST(Merge, DocumentsAndSourcesInOrder) {
  TempDir dir;
  MakeStore(dir / "a", {5, 6});
  MakeStore(dir / "b", {7});
  const DatasetInfo info = Value(
      MergeDatasets({.inputs = {dir / "a", dir / "b"}, .output = dir / "both", .name = "both"}));
  auto expected = Documents(dir / "a");
  for (const Read& read : Documents(dir / "b")) expected.push_back(read);
  EXPECT_EQ(Documents(dir / "both"), expected);
  EXPECT_EQ(info.sources.size(), 1U);  // the same name, licence and note
  EXPECT_EQ(info.sources[0].documents, 3);
  SALA_ASSERT_OK(VerifyDataset(dir / "both", true).status());
}

TEST(Merge, StoresThatDoNotGoTogether) {
  TempDir dir;
  MakeStore(dir / "text", {5});
  MakeStore(dir / "chat", {5}, 1 << 20, /*sft=*/true);
  ExpectError(
      MergeDatasets({.inputs = {dir / "text", dir / "chat"}, .output = dir / "m", .name = "m"})
          .status(),
      "DS-KIND", ExitCode::kData, {"chat", "kind sft", "kind pretrain"});
  DatasetInfo other;
  other.kind = "pretrain";
  other.vocab_size = 300;
  other.tokenizer_name = "other";
  other.tokenizer_fingerprint = "0123456789abcdef";
  auto writer =
      Value(TokenStoreWriter::CreateLike({.directory = dir / "other", .name = "o"}, other));
  writer->AddSource("o", "", "");
  const std::vector<int32_t> tokens = {1, 2};
  SALA_ASSERT_OK(writer->Add({.tokens = tokens}));
  Value(writer->Finish({}));
  ExpectError(
      MergeDatasets({.inputs = {dir / "text", dir / "other"}, .output = dir / "m", .name = "m"})
          .status(),
      "TOK-MISMATCH", ExitCode::kData, {"0123456789ab of 300 tokens", "of 261 tokens"});
  EXPECT_FALSE(PathExists(dir / "m"));
}

// The files Megatron's builder writes, each part changeable.
struct Megatron {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t code = 8;
  std::vector<int32_t> lengths = {3, 2, 4};
  std::vector<int64_t> pointers = {0, 6, 10};
  std::vector<int64_t> documents = {0, 2, 2, 3};  // two sequences, none, one
  std::string modes = {};
  std::vector<uint16_t> tokens = {72, 105, 32, 33, 257, 79, 107, 46, 257};
  std::string behind = {};

  void Write(const std::string& prefix) const {
    std::string idx = magic;
    const auto put = [&](const auto& value) {
      idx.append(reinterpret_cast<const char*>(&value), sizeof value);
    };
    put(version);
    put(code);
    put(static_cast<uint64_t>(lengths.size()));
    put(static_cast<uint64_t>(documents.size()));
    for (const int32_t v : lengths) put(v);
    for (const int64_t v : pointers) put(v);
    for (const int64_t v : documents) put(v);
    WriteText(prefix + ".idx", idx + modes + behind);
    WriteText(prefix + ".bin",
              std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size() * 2));
  }
};

class MegatronTest : public ::testing::Test {
 protected:
  StatusOr<DatasetInfo> Import(const Megatron& files, bool with_tokenizer = true) {
    files.Write(dir_ / "m");
    MegatronOptions options{.prefix = dir_ / "m",
                            .output = dir_ / ("out" + std::to_string(++runs_)),
                            .name = "meg",
                            .license = "CC0-1.0",
                            .vocab_size = with_tokenizer ? 0 : 300};
    return ImportMegatron(options, with_tokenizer ? tokenizer_.get() : nullptr);
  }
  void Refused(const Megatron& files, const std::string& code,
               const std::vector<std::string>& parts) {
    ExpectError(Import(files).status(), code, ExitCode::kData, parts);
    EXPECT_FALSE(PathExists(dir_ / ("out" + std::to_string(runs_))));
  }
  TempDir dir_;
  int runs_ = 0;
  std::unique_ptr<Tokenizer> tokenizer_ = MakeByteTokenizer();
};

TEST_F(MegatronTest, SequencesBecomeDocuments) {
  const DatasetInfo info = Value(Import({}));
  EXPECT_EQ(info.documents, 2);
  EXPECT_EQ(info.ingest["empty_documents"], 1);
  EXPECT_TRUE(info.add_eos);   // both end with 257
  EXPECT_FALSE(info.add_bos);  // none begins with 256
  const auto documents = Documents(info.directory);
  EXPECT_EQ(documents[0].tokens, (std::vector<int32_t>{72, 105, 32, 33, 257}));
  EXPECT_EQ(documents[0].hash, Xxh3("Hi !"));  // as of the text
  EXPECT_EQ(documents[1].tokens, (std::vector<int32_t>{79, 107, 46, 257}));
  EXPECT_EQ(documents[1].source, "meg");
  SALA_ASSERT_OK(Value(TokenStore::Open(info.directory))->CheckTokenizer(*tokenizer_));
}

TEST_F(MegatronTest, OtherTypesAndModes) {
  const auto reference = Documents(Value(Import({})).directory);
  // The same ids as i32: twice the bytes.
  Megatron wide;
  wide.code = 4;
  wide.pointers = {0, 12, 20};
  std::vector<uint16_t> tokens;
  for (const uint16_t id : wide.tokens) {
    tokens.push_back(id);
    tokens.push_back(0);
  }
  wide.tokens = tokens;
  wide.modes = std::string(3, '\0');
  EXPECT_EQ(Documents(Value(Import(wide)).directory), reference);
  wide.tokens[1] = 0xffff;  // the first id is negative
  wide.modes.clear();
  Refused(wide, "DS-RANGE", {"document 0, sequence 0, token 0 (byte 0)", "expected 0 to 260"});
}

TEST_F(MegatronTest, WithoutATokenizer) {
  const DatasetInfo info = Value(Import({}, /*with_tokenizer=*/false));
  EXPECT_EQ(info.vocab_size, 300);
  EXPECT_EQ(info.tokenizer_fingerprint, kUnknownTokenizer);
  // 300 tokens are not the 261 of the byte tokenizer.
  ExpectError(Value(TokenStore::Open(info.directory))->CheckTokenizer(*tokenizer_), "TOK-MISMATCH",
              ExitCode::kData, {"unknown", "300"});
}

TEST_F(MegatronTest, EveryDamageIsNamed) {
  Megatron m;
  m.magic[0] = 'X';
  Refused(m, "ING-FOREIGN", {"m.idx", "no Megatron index"});
  m = {};
  m.version = 2;
  Refused(m, "ING-FOREIGN", {"version 2"});
  for (const uint8_t code : {6, 7}) {
    m = {};
    m.code = code;
    Refused(m, "ING-FOREIGN", {"floating point"});
  }
  m.code = 99;
  Refused(m, "ING-FOREIGN", {"type code 99"});
  m = {};
  m.documents = {1, 2, 3};
  Refused(m, "ING-FOREIGN", {"starts with 1"});
  m.documents = {0, 2, 1, 3};
  Refused(m, "ING-FOREIGN", {"falls behind document 1"});
  m.documents = {0, 2};
  Refused(m, "ING-FOREIGN", {"ends with 2", "3 sequences"});
  m.documents = {0};
  Refused(m, "ING-FOREIGN", {"cannot be"});
  m = {};
  m.lengths[1] = -1;
  Refused(m, "ING-FOREIGN", {"sequence 1 has length -1"});
  m = {};
  m.pointers[2] = 11;
  Refused(m, "ING-FOREIGN", {"sequence 2 lies at byte 11", "outside", "18 bytes"});
  m.pointers[2] = -2;
  Refused(m, "ING-FOREIGN", {"sequence 2 lies at byte -2"});
  m.pointers[2] = std::numeric_limits<int64_t>::max();
  Refused(m, "ING-FOREIGN", {"sequence 2 lies at byte 9223372036854775807"});
  m = {};
  m.pointers = {0, 4, 8};
  m.lengths = {3, 3, 4};
  Refused(m, "ING-FOREIGN", {"sequences up to 2", "20 bytes", "has 18;", "overlap"});
  m = {};
  m.modes = std::string("\0\1\0", 3);
  Refused(m, "ING-MODALITY", {"sequence 1 has mode 1"});
  m = {};
  m.behind = "xx";
  Refused(m, "ING-FOREIGN", {"bytes", "copy it again"});
  m = {};
  m.tokens[4] = 261;
  Refused(m, "DS-RANGE", {"m.bin", "document 0, sequence 1, token 1 (byte 8) has id 261"});
  m = {};
  m.lengths = {0, 0, 0};
  Refused(m, "ING-FOREIGN", {"no document has a token"});
}

TEST_F(MegatronTest, CutAndMissingFiles) {
  Megatron().Write(dir_ / "m");
  const std::string idx = ReadText(dir_ / "m.idx");
  MegatronOptions options{.prefix = dir_ / "m", .output = dir_ / "out", .name = "meg"};
  for (size_t length = 0; length < idx.size(); ++length) {
    WriteText(dir_ / "m.idx", idx.substr(0, length));
    ExpectError(ImportMegatron(options, tokenizer_.get()).status(), "ING-FOREIGN", ExitCode::kData);
  }
  WriteText(dir_ / "m.idx", idx);
  std::filesystem::remove(dir_ / "m.bin");
  ExpectError(ImportMegatron(options, tokenizer_.get()).status(), "FILE-MISSING",
              ExitCode::kNoInput, {"m.bin"});
}

TEST(ShowDocument, CountsInAFile) {
  TempDir dir;
  MakeStore(dir / "set", {5, 6, 7}, /*shard_tokens=*/8);
  const std::string third = Value(ShowDocument(dir / "set", 2, nullptr));
  const std::string same = Value(ShowDocument(dir / "set", 0, nullptr, "tokens-00002.h5"));
  EXPECT_EQ(third.substr(third.find('\n')), same.substr(same.find('\n')));
  EXPECT_EQ(Value(ShowDocument(dir / "set", 0, nullptr, "2")), same);
  ExpectError(ShowDocument(dir / "set", 1, nullptr, "2").status(), "DS-DOCUMENT", ExitCode::kUsage,
              {"documents 0 to 0"});
  ExpectError(ShowDocument(dir / "set", 0, nullptr, "9").status(), "DS-DOCUMENT", ExitCode::kUsage,
              {"no file 9", "tokens-00000.h5"});
  const auto json = nlohmann::json::parse(Value(VerifyDataset(dir / "set", true, true)));
  EXPECT_EQ(json["checked"], "full");
  EXPECT_EQ(json["documents"], 3);
}

}  // namespace
}  // namespace sala::data
