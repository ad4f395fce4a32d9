#include "data/tokenizer.h"

#include <nlohmann/json.hpp>

#include "core/file.h"
#include "data/utf8.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

constexpr int64_t kVocab = 400;

using SentencePieceTokenizerTest = TrainedTokenizerTest<kVocab>;

TEST_F(SentencePieceTokenizerTest, IdsOfTheSpecialTokens) {
  EXPECT_EQ(tokenizer_->vocab_size(), kVocab);
  EXPECT_EQ(tokenizer_->unk_id(), 0);
  EXPECT_EQ(tokenizer_->bos_id(), 1);
  EXPECT_EQ(tokenizer_->eos_id(), 2);
  EXPECT_EQ(tokenizer_->pad_id(), 2);
  EXPECT_EQ(tokenizer_->FindToken(kImEnd), kVocab - 2);
  EXPECT_EQ(tokenizer_->FindToken(kImStart), kVocab - 1);
  EXPECT_EQ(tokenizer_->FindToken("<s>"), 1);
  EXPECT_FALSE(tokenizer_->FindToken("<|tool_call|>").has_value());
}

TEST_F(SentencePieceTokenizerTest, TextComesBackExactly) {
  const std::vector<std::string> texts = {"",
                                          " ",
                                          "   ",
                                          "\n",
                                          "\n\n\n",
                                          "\t\tx",
                                          " leading and trailing ",
                                          "a\r\nb",
                                          SampleText(2),
                                          "tabs\tand  double  spaces\n\n\nblank lines\n",
                                          "\xf0\x9f\x98\x80\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd",
                                          "\xd0\x9f\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82",
                                          "\xef\xbb\xbfmark",
                                          "\xe2\x80\x8bzero width",
                                          "e\xcc\x81 not composed",
                                          std::string(3000, 'x'),
                                          "<s></s><unk>"};
  for (const std::string& text : texts)
    EXPECT_EQ(tokenizer_->Decode(tokenizer_->Encode(text)), text);
}

TEST_F(SentencePieceTokenizerTest, LearnsMoreThanBytes) {
  const std::string text = SampleText(1);
  // Bytes alone would give one token a byte; 400 pieces on repetitive text have to do clearly
  // better.
  EXPECT_LT(tokenizer_->Encode(text).size(), text.size() * 2 / 3);
}

TEST_F(SentencePieceTokenizerTest, SpecialTokensAreSplitOffFirst) {
  const int32_t end = *tokenizer_->FindToken(kImEnd);
  const int32_t start = *tokenizer_->FindToken(kImStart);
  const auto glued = tokenizer_->Encode("a<|im_end|><|im_start|>b");
  std::vector<int32_t> expected = tokenizer_->Encode("a");
  expected.push_back(end);
  expected.push_back(start);
  for (const int32_t id : tokenizer_->Encode("b")) expected.push_back(id);
  EXPECT_EQ(glued, expected);
  EXPECT_EQ(tokenizer_->Decode(glued), "a<|im_end|><|im_start|>b");
  for (const int32_t id : tokenizer_->Encode("<|im_en|> <|im_end|")) EXPECT_LT(id, kVocab - 2);
}

TEST_F(SentencePieceTokenizerTest, OffsetsPointAtTheFirstByteOfEachToken) {
  const std::string text = "The dog\n<|im_end|>the \xf0\x9f\xa6\x8a river";
  const auto pieces = tokenizer_->EncodeWithOffsets(text);
  std::vector<int32_t> ids;
  std::string rebuilt;
  for (const auto& piece : pieces) {
    ids.push_back(piece.id);
    EXPECT_LE(piece.begin, static_cast<int64_t>(rebuilt.size()));
    // The bytes of one character share its start; every other token starts where the text before it
    // ends.
    if (static_cast<size_t>(piece.begin) != rebuilt.size()) {
      EXPECT_EQ(static_cast<uint8_t>(text[rebuilt.size()]) & 0xc0, 0x80) << piece.begin;
    }
    rebuilt += tokenizer_->Decode({&piece.id, 1});
  }
  EXPECT_EQ(rebuilt, text);
  EXPECT_EQ(ids, tokenizer_->Encode(text));
}

TEST_F(SentencePieceTokenizerTest, StreamingGivesWholeCharacters) {
  const std::string text = "caf\xc3\xa9 \xf0\x9f\xa6\x8a\n<|im_end|>";
  StreamDecoder decoder(tokenizer_.get());
  std::string out;
  for (const int32_t id : tokenizer_->Encode(text)) {
    const std::string part = decoder.Push(id);
    EXPECT_LT(FindInvalidUtf8(part), 0);
    out += part;
  }
  EXPECT_EQ(out + decoder.Finish(), text);
}

TEST_F(SentencePieceTokenizerTest, TrainingIsDeterministicAndNamesNoPath) {
  TempDir other;
  TrainTokenizer(other, "elsewhere", kVocab);
  EXPECT_EQ(ReadText(other / "elsewhere/tokenizer.model"), ReadText(*dir_ / "tok/tokenizer.model"));
  EXPECT_EQ(Value(LoadTokenizer(other / "elsewhere"))->fingerprint(), tokenizer_->fingerprint());
}

TEST_F(SentencePieceTokenizerTest, FingerprintFollowsTheVocabulary) {
  TempDir other;
  TrainTokenizer(other, "smaller", kVocab - 10);
  EXPECT_NE(Value(LoadTokenizer(other / "smaller"))->fingerprint(), tokenizer_->fingerprint());
  SALA_ASSERT_OK(tokenizer_->SaveTo(other / "more"));
  const nlohmann::json added = {
      {kImEnd, kVocab - 2}, {kImStart, kVocab - 1}, {"<|tool_call|>", kVocab}};
  WriteText(other / "more/added_tokens.json", added.dump());
  const auto more = Value(LoadTokenizer(other / "more"));
  EXPECT_EQ(more->vocab_size(), kVocab + 1);
  EXPECT_NE(more->fingerprint(), tokenizer_->fingerprint());
}

TEST_F(SentencePieceTokenizerTest, SavedFilesLoadAgainAndSayWhatIsTrue) {
  TempDir other;
  SALA_ASSERT_OK(tokenizer_->SaveTo(other / "copy"));
  EXPECT_EQ(Value(LoadTokenizer(other / "copy"))->fingerprint(), tokenizer_->fingerprint());
  const auto config = nlohmann::json::parse(ReadText(other / "copy/tokenizer_config.json"));
  EXPECT_EQ(config["bos_token"], "<s>");
  EXPECT_EQ(config["eos_token"], "</s>");
  EXPECT_EQ(config["added_tokens_decoder"][std::to_string(kVocab - 2)]["content"], kImEnd);
  const auto special = nlohmann::json::parse(ReadText(other / "copy/special_tokens_map.json"));
  EXPECT_EQ(special["unk_token"], "<unk>");
}

TEST(TokenizerErrors, MissingAndBrokenFiles) {
  TempDir dir;
  ExpectError(LoadTokenizer(dir / "none").status(), "TOK-MISSING", ExitCode::kNoInput,
              {"none", "tokenizer.model"});
  ExpectError(LoadTokenizer(dir.path()).status(), "TOK-MISSING", ExitCode::kNoInput,
              {"no tokenizer.model"});
  WriteText(dir / "tokenizer.model", "this is no model");
  ExpectError(LoadTokenizer(dir.path()).status(), "TOK-FORMAT", ExitCode::kData,
              {"tokenizer.model", "16 bytes"});
}

TEST(TokenizerErrors, AddedTokensNeedTheIdsAfterThePieces) {
  TempDir dir;
  TrainTokenizer(dir, "tok", kVocab);
  WriteText(dir / "tok/added_tokens.json", R"({"<|im_end|>": 7})");
  ExpectError(LoadTokenizer(dir / "tok").status(), "TOK-FORMAT", ExitCode::kData,
              {"<|im_end|>", "has id 7", "398"});
  WriteText(dir / "tok/added_tokens.json", "[1");
  ExpectError(LoadTokenizer(dir / "tok").status(), "TOK-FORMAT", ExitCode::kData,
              {"not a JSON object"});
}

TEST(TokenizerErrors, VocabularyTheTextCannotFill) {
  TempDir dir;
  WriteText(dir / "corpus.txt", "a few words only\n");
  const TrainTokenizerOptions options{
      .inputs = {dir / "corpus.txt"}, .vocab_size = 5000, .output = dir / "tok"};
  ExpectError(TrainSentencePiece(options).status(), "TOK-TRAIN", ExitCode::kData, {"5000"});
  TrainTokenizerOptions tiny = options;
  tiny.vocab_size = 100;
  ExpectError(TrainSentencePiece(tiny).status(), "TOK-TRAIN", ExitCode::kConfig,
              {"found 100", "262"});
}

TEST(ByteTokenizer, EveryByteIsItsOwnToken) {
  const auto tokenizer = Value(LoadTokenizer("bytes"));
  EXPECT_EQ(tokenizer->vocab_size(), 261);
  EXPECT_EQ(tokenizer->Encode("a\n<|im_start|>"), (std::vector<int32_t>{97, 10, 259}));
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(all)), all);
  TempDir dir;
  SALA_ASSERT_OK(tokenizer->SaveTo(dir / "saved"));
  EXPECT_EQ(Value(LoadTokenizer(dir / "saved"))->fingerprint(), tokenizer->fingerprint());
}

TEST(Utf8, FindsTheFirstBadByte) {
  EXPECT_EQ(FindInvalidUtf8("plain"), -1);
  EXPECT_EQ(FindInvalidUtf8("\xe2\x82\xac\xff"), 3);
  EXPECT_EQ(FindInvalidUtf8("ab\xed\xa0\x80"), 2);  // a surrogate
  EXPECT_EQ(FindInvalidUtf8("\xc0\xaf"), 0);        // overlong
  EXPECT_EQ(ReplaceInvalidUtf8("a\xff"
                               "b"),
            "a\xef\xbf\xbd"
            "b");
}

}  // namespace
}  // namespace sala::data
