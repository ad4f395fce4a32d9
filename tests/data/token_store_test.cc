#include "data/token_store.h"

#include "core/file.h"
#include "data/commands.h"
#include "data/token_shard.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

void FlipByte(const std::string& path, int64_t at) {
  std::string bytes = ReadText(path);
  bytes[static_cast<size_t>(at)] = static_cast<char>(bytes[static_cast<size_t>(at)] ^ 0x10);
  WriteText(path, bytes);
}

// A dataset.json whose own CRC is right again after an edit.
void EditInfo(const std::string& directory, const std::string& from, const std::string& to) {
  const std::string path = directory + "/dataset.json";
  std::string text = ReadText(path);
  const size_t at = text.find(from);
  ASSERT_NE(at, std::string::npos) << from;
  text.replace(at, from.size(), to);
  const std::string key = "\"self_crc32c\": \"";
  const size_t crc = text.rfind(key) + key.size();
  text.replace(crc, 8, "00000000");
  const std::string value = Hex32(Crc32c(text.data(), text.size()));
  text.replace(crc, 8, value);
  WriteText(path, text);
}

TEST(TokenStore, GivesBackWhatWasWritten) {
  TempDir dir;
  const auto store = MakeStore(dir / "set", {5, 40, 3, 16, 9}, /*shard_tokens=*/30, /*sft=*/true);
  const DatasetInfo& info = store->info();
  EXPECT_EQ(store->files(), 3);  // 5 | 40, longer than a file may be | 3 + 16 + 9
  EXPECT_EQ(info.documents, 5);
  EXPECT_EQ(info.tokens, 73);
  EXPECT_EQ(info.token_dtype, "u16");
  EXPECT_EQ(info.length_histogram[3], 1);             // 9
  EXPECT_EQ(info.length_histogram[5], 1);             // 40
  EXPECT_EQ(info.target_tokens, 2 + 13 + 1 + 5 + 3);  // j % 3 == 1 of each length
  EXPECT_EQ(info.sources[0].license, "CC0-1.0");
  EXPECT_EQ(info.pad_id, 258);
  EXPECT_EQ(info.unk_id, -1);
  int64_t n = 0;
  for (int64_t f = 0; f < store->files(); ++f) {
    TokenFile* file = Value(store->File(f));
    for (int64_t d = 0; d < file->documents(); ++d, ++n) {
      std::vector<int32_t> tokens(static_cast<size_t>(file->length(d)));
      std::vector<uint8_t> mask(tokens.size());
      SALA_ASSERT_OK(file->CopyTokens(file->begin(d), file->length(d), tokens.data()));
      SALA_ASSERT_OK(file->CopyMask(file->begin(d), file->length(d), mask.data()));
      for (size_t j = 0; j < tokens.size(); ++j) {
        EXPECT_EQ(tokens[j], (n * 31 + static_cast<int64_t>(j)) % 200);
        EXPECT_EQ(mask[j], j % 3 == 1 ? 1 : 0);
      }
      EXPECT_EQ(file->hash(d), Xxh3(std::to_string(n)));
    }
  }
  EXPECT_EQ(n, 5);
}

TEST(TokenStore, WideTokensForLargeVocabularies) {
  TempDir dir;
  ShardContent content;
  content.tokens = {0, 70000, 73447};
  content.doc_offsets = {0, 3};
  content.doc_source = {0};
  content.doc_hash = {1};
  SALA_ASSERT_OK(
      WriteShard(dir / "wide.h5", content,
                 {.kind = "pretrain", .tokenizer_fingerprint = "f", .vocab_size = 73448}));
  const ShardLayout layout = Value(ReadShardLayout(dir / "wide.h5"));
  EXPECT_EQ(layout.arrays.at("tokens").item_bytes, 4);
  EXPECT_EQ(layout.header.tokens, 3);
}

TEST(TokenStore, SameContentSameFingerprint) {
  TempDir dir;
  const auto a = MakeStore(dir / "a", {5, 6});
  const auto b = MakeStore(dir / "b", {5, 6});
  const auto c = MakeStore(dir / "c", {5, 7});
  EXPECT_EQ(a->info().fingerprint, b->info().fingerprint);
  EXPECT_NE(a->info().fingerprint, c->info().fingerprint);
}

class TokenStoreFaults : public ::testing::Test {
 protected:
  void SetUp() override { MakeStore(dir_ / "set", {5, 40, 3, 16, 9}); }
  Status ReadAll() {
    SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open(dir_ / "set"));
    SALA_ASSIGN_OR_RETURN(TokenFile * file, store->File(0));
    std::vector<int32_t> tokens(73);
    return file->CopyTokens(0, 73, tokens.data());
  }
  std::string shard() const { return dir_ / "set/tokens-00000.h5"; }
  TempDir dir_;
};

TEST_F(TokenStoreFaults, FlippedBitInTokens) {
  const ShardLayout layout = Value(ReadShardLayout(shard()));
  FlipByte(shard(), layout.arrays.at("tokens").offset + 20);
  ExpectError(ReadAll(), "DS-CRC", ExitCode::kData,
              {"tokens-00000.h5", "/tokens block 0", "expected"});
  SALA_ASSERT_OK(VerifyDataset(dir_ / "set", /*full=*/false).status());
  ExpectError(VerifyDataset(dir_ / "set", /*full=*/true).status(), "DS-CRC", ExitCode::kData,
              {"/tokens block 0"});
}

TEST_F(TokenStoreFaults, FlippedBitInOffsetsAndHashes) {
  const ShardLayout layout = Value(ReadShardLayout(shard()));
  for (const char* name : {"doc_offsets", "doc_hash", "doc_source"}) {
    FlipByte(shard(), layout.arrays.at(name).offset);
    ExpectError(ReadAll(), "DS-CRC", ExitCode::kData, {name});
    FlipByte(shard(), layout.arrays.at(name).offset);
  }
  SALA_ASSERT_OK(ReadAll());
}

TEST_F(TokenStoreFaults, FlippedBitOutsideTheArraysIsFoundByFullVerify) {
  const ShardLayout layout = Value(ReadShardLayout(shard()));
  const ShardArray& last = layout.arrays.at("tokens");
  const int64_t behind = last.offset + last.bytes() + 1;  // padding up to the next 4096
  FlipByte(shard(), behind);
  ExpectError(VerifyDataset(dir_ / "set", true).status(), "DS-CRC", ExitCode::kData, {"SHA-256"});
}

TEST_F(TokenStoreFaults, Truncated) {
  const std::string bytes = ReadText(shard());
  WriteText(shard(), bytes.substr(0, bytes.size() - 100));
  ExpectError(ReadAll(), "DS-SIZE", ExitCode::kData,
              {std::to_string(bytes.size()), std::to_string(bytes.size() - 100)});
}

TEST_F(TokenStoreFaults, MissingFileAndMissingDataset) {
  std::filesystem::remove(shard());
  EXPECT_EQ(ExitCodeOf(ReadAll()), ExitCode::kNoInput);
  ExpectError(TokenStore::Open(dir_ / "nothing").status(), "DS-MISSING", ExitCode::kNoInput,
              {"dataset.json"});
}

TEST_F(TokenStoreFaults, ShardOfAnotherFormat) {
  WriteText(shard(), std::string(ReadText(shard()).size(), 'x'));
  ExpectError(ReadAll(), "DS-FORMAT", ExitCode::kData, {"tokens-00000.h5"});
}

TEST_F(TokenStoreFaults, EditedDatasetJson) {
  std::string text = ReadText(dir_ / "set/dataset.json");
  text.replace(text.find("\"made\""), 6, "\"mode\"");
  WriteText(dir_ / "set/dataset.json", text);
  ExpectError(ReadAll(), "DS-CRC", ExitCode::kData, {"dataset.json", "was changed"});
}

TEST_F(TokenStoreFaults, VersionAndVocabularyOfTheFileAndOfTheHeader) {
  EditInfo(dir_ / "set", "\"version\": 1", "\"version\": 2");
  ExpectError(ReadAll(), "DS-VERSION", ExitCode::kData, {"version 2", "reads 1"});
  EditInfo(dir_ / "set", "\"version\": 2", "\"version\": 1");
  EditInfo(dir_ / "set", "\"vocab_size\": 261", "\"vocab_size\": 262");
  ExpectError(ReadAll(), "DS-FORMAT", ExitCode::kData, {"vocab_size is 261", "says 262"});
}

TEST_F(TokenStoreFaults, TotalsThatDoNotAddUp) {
  EditInfo(dir_ / "set", "\"documents\": 5", "\"documents\": 6");
  ExpectError(ReadAll(), "DS-FORMAT", ExitCode::kData, {"documents"});
}

TEST(TokenStoreShard, IdsAboveTheVocabularyAreFound) {
  TempDir dir;
  MakeStore(dir / "set", {4});
  // A file of the same shape with an id that the vocabulary does not have.
  ShardContent content;
  content.tokens = {0, 1, 300, 3};
  content.doc_offsets = {0, 4};
  content.doc_source = {0};
  content.doc_hash = {Xxh3("0")};
  const ShardHeader header = Value(ReadShardLayout(dir / "set/tokens-00000.h5")).header;
  SALA_ASSERT_OK(WriteShard(dir / "set/tokens-00000.h5", content, header));
  auto store = Value(TokenStore::Open(dir / "set"));
  TokenFile* file = Value(store->File(0));
  int32_t token = 0;
  ExpectError(file->CopyTokens(0, 1, &token), "DS-RANGE", ExitCode::kData,
              {"token 2 has id 300", "vocab_size 261"});
}

TEST(TokenStoreShard, OffsetsThatDoNotRise) {
  TempDir dir;
  MakeStore(dir / "set", {4, 4});
  ShardContent content;
  content.tokens = {0, 1, 2, 3, 4, 5, 6, 7};
  content.doc_source = {0, 0};
  content.doc_hash = {1, 2};
  const ShardHeader header = Value(ReadShardLayout(dir / "set/tokens-00000.h5")).header;
  const std::vector<std::pair<std::vector<uint64_t>, std::string>> bad = {
      {{0, 0, 8}, "does not rise at document 0"},
      {{1, 4, 8}, "starts with 1"},
      {{0, 4, 7}, "ends with 7"}};
  for (const auto& [offsets, message] : bad) {
    content.doc_offsets = offsets;
    SALA_ASSERT_OK(WriteShard(dir / "set/tokens-00000.h5", content, header));
    ExpectError(Value(TokenStore::Open(dir / "set"))->File(0).status(), "DS-OFFSETS",
                ExitCode::kData, {message});
  }
}

TEST(TokenStoreCommands, InfoVerifyShow) {
  TempDir dir;
  MakeStore(dir / "set", {5, 7}, 1 << 20, /*sft=*/true);
  const std::string info = Value(DescribeDataset(dir / "set"));
  EXPECT_THAT(info, ::testing::HasSubstr("made (sft)"));
  EXPECT_THAT(info, ::testing::HasSubstr("licence CC0-1.0"));
  EXPECT_THAT(Value(VerifyDataset(dir / "set", true)),
              ::testing::HasSubstr("2 documents and 12 tokens"));
  EXPECT_THAT(Value(ShowDocument(dir / "set", 0, nullptr)),
              ::testing::HasSubstr("\n0 1* 2 3 4*\n"));
  const auto tokenizer = MakeByteTokenizer();
  EXPECT_THAT(Value(ShowDocument(dir / "set", 1, tokenizer.get())),
              ::testing::HasSubstr("[[ ]]!"));  // 32 is a space
  ExpectError(ShowDocument(dir / "set", 2, nullptr).status(), "DS-DOCUMENT", ExitCode::kUsage,
              {"0 to 1"});
}

}  // namespace
}  // namespace sala::data
