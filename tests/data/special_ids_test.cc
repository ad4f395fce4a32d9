// Ids of bos and eos that files beside a vocabulary say: where they come from, and that data made
// with others is not mixed.
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "data/chat_renderer.h"
#include "data/ingest.h"
#include "data/shuffle.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

using nlohmann::json;

constexpr int32_t kMarkedA = 1, kA = 2, kBos = 3, kEos = 4, kOther = 5;

json AddedToken(int32_t id, const std::string& content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

// The mark stands before the first word of a text only, so "a" behind a token is another id.
json Tokens() {
  return {{"added_tokens",
           {AddedToken(kBos, "<s>"), AddedToken(kEos, "</s>"), AddedToken(kOther, "<o>")}},
          {"pre_tokenizer",
           {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "first"}}},
          {"model",
           {{"type", "BPE"},
            {"vocab", {{"\u2581", 0}, {"\u2581a", kMarkedA}, {"a", kA}}},
            {"merges", {"\u2581 a"}}}}};
}

class SpecialIdsTest : public ::testing::Test {
 protected:
  SpecialIdsTest() {
    WriteText(dir_ / "tokenizer.json", Tokens().dump());
    Config({{"bos_token", "<s>"}, {"eos_token", "</s>"}});
  }
  void Config(const json& config) { WriteText(dir_ / "tokenizer_config.json", config.dump()); }
  std::unique_ptr<Tokenizer> Load() { return Value(LoadTokenizer(dir_.path())); }
  IngestOptions Options(const std::string& output) {
    IngestOptions options{.sources = {{.name = "s", .inputs = {dir_ / "in.jsonl"}}},
                          .output = dir_ / output,
                          .name = "set"};
    options.tokenizer_path = dir_.path();
    return options;
  }
  TempDir dir_;
};

TEST_F(SpecialIdsTest, NoBosWhereTheTokenizerSaysSo) {
  WriteText(dir_ / "config.json", R"({"bos_token_id": 5, "eos_token_id": 5})");
  WriteText(dir_ / "special_tokens_map.json", R"({"bos_token": "<s>"})");
  Config(json::object());
  EXPECT_EQ(Load()->bos_id(), kBos);
  Config({{"bos_token", nullptr}});
  EXPECT_EQ(Load()->bos_id(), -1);
  EXPECT_EQ(Load()->eos_id(), kOther);
  Config({{"bos_token", "<s>"}, {"add_bos_token", false}});
  EXPECT_EQ(Load()->bos_id(), -1);
  Config({{"bos_token", "<s>"}, {"add_bos_token", true}});
  EXPECT_EQ(Load()->bos_id(), kBos);
}

TEST_F(SpecialIdsTest, WhatFollowsTheBosOfATemplateIsNoStartOfAText) {
  const auto tokenizer = Load();
  const auto open = [&](const std::string& text) {
    WriteText(dir_ / "chat_template.jinja", text);
    return Value(ChatRenderer::Open("tokenizer", dir_.path(), *tokenizer, ChatMask::kAllTokens));
  };
  const ChatRecord record{{{"user", "a"}}, ""};
  const std::vector<int32_t> written = {kBos, kA};
  auto renderer = open("{{ bos_token }}{{ messages[0].content }}");
  EncodedChat chat = Value(renderer->Encode(record));
  EXPECT_EQ(chat.tokens, written);
  AddDocumentEnds(kBos, -1, &chat);
  EXPECT_EQ(chat.tokens, written);
  EXPECT_EQ(Value(renderer->EncodePrompt(record)), written);
  renderer = open("{{ messages[0].content }}");
  EXPECT_EQ(Value(renderer->EncodePrompt(record)), (std::vector<int32_t>{kBos, kMarkedA}));
}

TEST_F(SpecialIdsTest, AnIngestGoesOnWithTheSameIdsOnly) {
  WriteText(dir_ / "in.jsonl", "{\"text\": \"a\"}\nbroken\n");
  WriteText(dir_ / "chat_template.jinja", "{{ messages[0].content }}");
  const json config = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
  for (const std::string chat_template : {"chatml", "tokenizer"}) {
    IngestOptions options = Options(chat_template);
    options.chat_template = chat_template;
    options.rules = {{"not_json", RecordRule::kSkip}};
    const auto changed = [&](const std::string& key, const std::string& what) {
      json other = config;
      other[key] = "<o>";
      Config(other);
      ExpectError(RunIngest(options, *Load()).status(), "ING-CHANGED", ExitCode::kConfig, {what});
      Config(config);
    };
    // Too many rejects: the pieces stay.
    ExpectError(RunIngest(options, *Load()).status(), "ING-REJECTS", ExitCode::kData);
    options.resume = true;
    options.max_rejects = 1;
    changed("bos_token", "bos_id 3, it is now 5");
    if (chat_template == "tokenizer") {
      changed("sep_token", "chat_special_sha256");
    } else {
      changed("eos_token", "eos_id 4, it is now 5");
      changed("pad_token", "pad_id -1, it is now 5");
    }
    EXPECT_EQ(Value(RunIngest(options, *Load())).info.documents, 1);
  }
}

TEST_F(SpecialIdsTest, StoresOfOtherIdsAreNotMerged) {
  WriteText(dir_ / "in.jsonl", "{\"text\": \"a\"}\n");
  Value(RunIngest(Options("a"), *Load()));
  Config({{"bos_token", "<s>"}, {"eos_token", "<o>"}});
  Value(RunIngest(Options("b"), *Load()));
  ExpectError(MergeDatasets({.inputs = {dir_ / "a", dir_ / "b"}, .output = dir_ / "m", .name = "m"})
                  .status(),
              "TOK-MISMATCH", ExitCode::kData, {"eos 5", "eos 4"});
  Config({{"bos_token", "<o>"}, {"eos_token", "</s>"}});
  Value(RunIngest(Options("c"), *Load()));
  ExpectError(MergeDatasets({.inputs = {dir_ / "a", dir_ / "c"}, .output = dir_ / "m", .name = "m"})
                  .status(),
              "TOK-MISMATCH", ExitCode::kData, {"bos 5", "bos 3"});
}

}  // namespace
}  // namespace sala::data
