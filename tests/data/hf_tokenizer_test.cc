// Tokenizers written here as tokenizer.json texts, with ids worked out by hand. What the
// `tokenizers` package gives is in hf_golden_test.cc and tests/oracle/hf_tokenizers.py.
#include "data/hf_tokenizer.h"

#include <nlohmann/json.hpp>

#include "core/file.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

using nlohmann::json;

// Llama's shape: a, b, c, the mark, ab, abc, mark+a, bytes of e-acute, added tokens.
json Fallback() {
  json vocab = {{"<unk>", 0}, {"\u2581", 1}, {"a", 2},       {"b", 3},      {"c", 4},
                {"ab", 5},    {"abc", 6},    {"\u2581a", 7}, {"<0xC3>", 8}, {"<0xA9>", 9}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", json::array()},
          {"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "\u2581"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}}}}},
          {"pre_tokenizer", nullptr},
          {"post_processor", nullptr},
          {"decoder", nullptr},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", "<unk>"},
            {"fuse_unk", true},
            {"byte_fallback", true},
            {"vocab", vocab},
            {"merges", {"a b", "ab c", "\u2581 a"}}}}};
}

json Added(int id, const std::string& content, const std::vector<std::string>& flags = {}) {
  json token = {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", false}};
  for (const std::string& flag : flags) token[flag] = true;
  return token;
}

class HfTokenizerTest : public ::testing::Test {
 protected:
  StatusOr<std::unique_ptr<Tokenizer>> Load(const json& tokenizer) {
    WriteText(dir_ / "tokenizer.json", tokenizer.dump());
    return LoadTokenizer(dir_.path());
  }
  std::vector<int32_t> Ids(const json& tokenizer, const std::string& text) {
    const auto loaded = Load(tokenizer);
    EXPECT_TRUE(loaded.ok()) << MessageOf(loaded.status());
    if (!loaded.ok()) return {};
    const std::vector<int32_t> ids = (*loaded)->Encode(text);
    EXPECT_EQ((*loaded)->Encode(text), ids) << "from the cache";
    std::vector<int32_t> placed;
    for (const auto& piece : (*loaded)->EncodeWithOffsets(text)) placed.push_back(piece.id);
    EXPECT_EQ(placed, ids);
    return ids;
  }
  using List = std::vector<int32_t>;
  TempDir dir_;
};

TEST_F(HfTokenizerTest, MergesByRankAndFallsBackToBytes) {
  EXPECT_EQ(Ids(Fallback(), "abc a"), (List{1, 6, 7}));
  EXPECT_EQ(Ids(Fallback(), "\u00e9"), (List{1, 8, 9}));
  EXPECT_EQ(Ids(Fallback(), "xxb"), (List{1, 0, 3}));  // fused unk
  json single = Fallback();
  single["model"]["fuse_unk"] = false;
  EXPECT_EQ(Ids(single, "xxb"), (List{1, 0, 0, 3}));
  EXPECT_EQ(Ids(Fallback(), ""), List{});
}

TEST_F(HfTokenizerTest, AddedTokensAndTheirFlags) {
  json flags = Fallback();
  flags["added_tokens"] = {Added(10, "<x>"), Added(11, "<x>y"), Added(12, "<l>", {"lstrip"}),
                           Added(13, "<r>", {"rstrip"}), Added(14, "w", {"single_word"})};
  EXPECT_EQ(Ids(flags, "a<x>b<x>y"), (List{7, 10, 1, 3, 11}));
  EXPECT_EQ(Ids(flags, "a <l> b"), (List{7, 12, 1, 1, 3}));
  EXPECT_EQ(Ids(flags, "a <r> b"), (List{7, 1, 13, 1, 3}));
  EXPECT_EQ(Ids(flags, "w wa"), (List{14, 1, 1, 0, 2}));
  // Space belongs to the token before where both want it.
  EXPECT_EQ(Ids(flags, "a <l> <l>  <r>  <l>b"), (List{7, 12, 12, 1, 1, 1, 13, 12, 1, 3}));
}

TEST_F(HfTokenizerTest, ReplacedTextIsNotReplacedAgain) {
  json doubled = Fallback();
  doubled["decoder"] = {{"type", "Replace"}, {"pattern", {{"String", "b"}}}, {"content", "bb"}};
  const auto tokenizer = Value(Load(doubled));
  EXPECT_EQ(tokenizer->Decode(List{6, 3, 3, 2}), "abbcbbbba");
}

TEST_F(HfTokenizerTest, PlacesAreThoseOfTheOriginalText) {
  json flags = Fallback();
  flags["added_tokens"] = {Added(10, "<x>")};
  const auto tokenizer = Value(Load(flags));
  std::vector<int64_t> begins;
  for (const auto& piece : tokenizer->EncodeWithOffsets("abc a<x>\u00e9"))
    begins.push_back(piece.begin);
  EXPECT_EQ(begins, (std::vector<int64_t>{0, 0, 3, 5, 8, 8, 9}));
}

TEST_F(HfTokenizerTest, WhatIsNotReadIsNamed) {
  const auto refuse = [&](const std::string& pointer, const json& value,
                          const std::vector<std::string>& parts) {
    json changed = Fallback();
    changed[json::json_pointer(pointer)] = value;
    ExpectError(Load(changed).status(), "TOK-UNSUPPORTED", ExitCode::kData, parts);
  };
  refuse("/model/type", "Unigram", {"model.type", "Unigram", "BPE"});
  refuse("/model/dropout", 0.1, {"model.dropout", "0.1"});
  refuse("/model/end_of_word_suffix", "</w>", {"model.end_of_word_suffix", "</w>"});
  refuse("/normalizer", {{"type", "NFD"}}, {"normalizer.type", "NFD"});
  refuse("/normalizer/normalizers/1/pattern", {{"Regex", " +"}},
         {"normalizer.normalizers[1].pattern", "Regex"});
  refuse("/normalizer/normalizers/0/prepend", "", {"normalizer.normalizers[0].prepend", "empty"});
  for (const std::string byte : {"\\x80", "[\\xFf]"}) {
    refuse("/pre_tokenizer",
           {{"type", "Split"},
            {"pattern", {{"Regex", byte}}},
            {"behavior", "Isolated"},
            {"invert", false}},
           {"pre_tokenizer.pattern.Regex", "\\x"});
  }
  // Without case one character may stand for two in Oniguruma.
  for (const std::string folded : {"(?i:ss)", "(?i:as(?:S)|b)", "(?i:(?:a|F)I)", "(?i:x(st))",
                                   "(?i:\u00df)", "(?i:[\ufb01a])", "(?i:\\u0073)"}) {
    const bool groups = folded == "(?i:x(st))";
    refuse("/pre_tokenizer",
           {{"type", "Split"},
            {"pattern", {{"Regex", folded}}},
            {"behavior", "Isolated"},
            {"invert", false}},
           {"pre_tokenizer.pattern.Regex", groups ? "'t' in it" : "another thing"});
  }
  for (const std::string plain :
       {"(?i:'s|'t|'re|'ve|'m|'ll|'d)|ss", "(?i:s?s|s+|s[s])|(?:ss|fi)"}) {
    json changed = Fallback();
    changed["pre_tokenizer"] = {{"type", "Split"},
                                {"pattern", {{"Regex", plain}}},
                                {"behavior", "Isolated"},
                                {"invert", false}};
    EXPECT_TRUE(Load(changed).ok()) << plain;
  }
  refuse("/pre_tokenizer", {{"type", "Punctuation"}, {"behavior", "Isolated"}},
         {"pre_tokenizer.type", "Punctuation"});
  refuse("/pre_tokenizer",
         {{"type", "Split"},
          {"pattern", {{"Regex", "\\w+"}}},
          {"behavior", "Isolated"},
          {"invert", false}},
         {"pre_tokenizer.pattern.Regex", "\\w"});
  refuse("/post_processor", {{"type", "BertProcessing"}}, {"post_processor.type"});
  const json text = {{"type", "TemplateProcessing"},
                     {"single", json::array({{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}})},
                     {"pair", json::array()},
                     {"special_tokens", json::object()}};
  refuse("/post_processor", {{"type", "Sequence"}, {"processors", json::array({text, text})}},
         {"post_processor.processors[1].type", "one TemplateProcessing is"});
  refuse("/decoder", {{"type", "WordPiece"}}, {"decoder.type", "WordPiece"});
  refuse("/truncation", {{"max_length", 512}}, {"truncation"});
  refuse("/other", 1, {"other"});
}

TEST_F(HfTokenizerTest, DamagedFilesAreRefused) {
  const auto refuse = [&](const std::string& pointer, const json& value,
                          const std::vector<std::string>& parts) {
    json changed = Fallback();
    changed[json::json_pointer(pointer)] = value;
    ExpectError(Load(changed).status(), "TOK-FORMAT", ExitCode::kData, parts);
  };
  refuse("/model/merges/0", "a zz", {"model.merges[0]", "zz"});
  refuse("/model/merges/0", "a", {"model.merges[0]", "one space"});
  refuse("/model/vocab/ab", 2, {"model.vocab", "an id of its own"});
  refuse("/model/vocab/ab", 1 << 30, {"model.vocab.ab", "16777215"});
  // 4 x (10 pieces + 0 added tokens) + 65536.
  refuse("/model/vocab/ab", 65577, {"model.vocab", "65576", "10 pieces", "65577"});
  refuse("/model/vocab/ab", -1, {"model.vocab.ab"});
  refuse("/model/unk_token", "none", {"model.unk_token", "none"});
  refuse("/added_tokens", json::array({Added(77, "<x>")}), {"added_tokens[0].id", "77", "10"});
  refuse("/added_tokens", json::array({Added(10, "<x>"), Added(10, "<y>")}),
         {"added_tokens[1].id"});
  WriteText(dir_ / "tokenizer.json", "{\"model\": ");
  ExpectError(LoadTokenizer(dir_.path()).status(), "TOK-FORMAT", ExitCode::kData, {"10 bytes"});
}

TEST_F(HfTokenizerTest, FingerprintFollowsMeaningNotForm) {
  const std::string first = Value(Load(Fallback()))->fingerprint();
  json spelled = Fallback();
  spelled["model"]["merges"] = json::parse(R"([["a", "b"], ["ab", "c"], ["\u2581", "a"]])");
  EXPECT_EQ(Value(Load(spelled))->fingerprint(), first);
  json switched = Fallback();
  switched["model"]["fuse_unk"] = false;
  EXPECT_NE(Value(Load(switched))->fingerprint(), first);
}

TEST_F(HfTokenizerTest, SpecialIdsComeFromTheFilesBeside) {
  WriteText(dir_ / "tokenizer_config.json", R"({"bos_token": {"content": "a"}})");
  WriteText(dir_ / "config.json", R"({"bos_token_id": 5, "eos_token_id": [3, 4]})");
  const auto tokenizer = Value(Load(Fallback()));
  EXPECT_EQ(tokenizer->bos_id(), 2);
  EXPECT_EQ(tokenizer->eos_id(), 3);
  EXPECT_EQ(tokenizer->pad_id(), -1);
  EXPECT_EQ(tokenizer->unk_id(), 0);
  SALA_ASSERT_OK(tokenizer->SaveTo(dir_ / "copy"));
  const auto copy = Value(LoadTokenizer(dir_ / "copy"));
  EXPECT_EQ(copy->eos_id(), 3);
  EXPECT_EQ(copy->fingerprint(), tokenizer->fingerprint());
  EXPECT_EQ(ReadText(dir_ / "copy/tokenizer.json"), ReadText(dir_ / "tokenizer.json"));
  WriteText(dir_ / "config.json", R"({"eos_token_id": 99})");
  ExpectError(Load(Fallback()).status(), "TOK-VOCAB", ExitCode::kData, {"99", "from 0 to 9"});
}

}  // namespace
}  // namespace sala::data
