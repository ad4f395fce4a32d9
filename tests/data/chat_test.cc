#include "data/chat.h"

#include <nlohmann/json.hpp>

#include "tests/data/test_data.h"

namespace sala::data {
namespace {

const std::vector<ChatMessage> kTalk = {{"system", "Be brief."},
                                        {"user", "Hello"},
                                        {"assistant", "Hi."},
                                        {"user", "And?"},
                                        {"assistant", "Bye."}};

// The learned parts of a rendering, joined by '|'.
std::string Learned(const std::vector<ChatMessage>& messages, ChatMask mask) {
  const RenderedChat chat = Value(RenderChat(ChatMl(), messages, mask));
  std::string out;
  for (const ByteSpan& span : chat.learned)
    out += (out.empty() ? "" : "|") + chat.text.substr(static_cast<size_t>(span.begin),
                                                       static_cast<size_t>(span.end - span.begin));
  return out;
}

TEST(ChatMl, RendersTheFormatOfTheModel) {
  const RenderedChat chat =
      Value(RenderChat(ChatMl(), {kTalk[1], kTalk[2]}, ChatMask::kAllAssistant));
  EXPECT_EQ(chat.text, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n");
  EXPECT_EQ(Value(RenderPrompt(ChatMl(), {kTalk[1]})),
            "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n");
}

TEST(ChatMl, LearnedSpansAreContentAndEndOfTurn) {
  EXPECT_EQ(Learned(kTalk, ChatMask::kAllAssistant), "Hi.<|im_end|>|Bye.<|im_end|>");
  EXPECT_EQ(Learned(kTalk, ChatMask::kLastAssistant), "Bye.<|im_end|>");
  EXPECT_THAT(Learned(kTalk, ChatMask::kAllTokens),
              ::testing::StartsWith("<|im_start|>system\nBe brief.<|im_end|>\n|"));
  auto talk = kTalk;
  talk[2].train = false;
  EXPECT_EQ(Learned(talk, ChatMask::kAllAssistant), "Bye.<|im_end|>");
  talk[4].train = false;
  EXPECT_EQ(Learned(talk, ChatMask::kAllAssistant), "");
  EXPECT_EQ(Learned(talk, ChatMask::kLastAssistant), "");
}

TEST(ChatMl, PromptIsAPrefixOfTheWholeConversation) {
  const std::string prompt = Value(RenderPrompt(ChatMl(), {kTalk.begin(), kTalk.begin() + 2}));
  const std::string whole =
      Value(RenderChat(ChatMl(), {kTalk.begin(), kTalk.begin() + 3}, ChatMask::kAllAssistant)).text;
  EXPECT_EQ(whole.substr(0, prompt.size()), prompt);
}

void ExpectMaskedText(const Tokenizer& tokenizer) {
  const RenderedChat chat = Value(RenderChat(ChatMl(), kTalk, ChatMask::kAllAssistant));
  const EncodedChat encoded = EncodeChat(chat, tokenizer);
  ASSERT_EQ(encoded.tokens.size(), encoded.mask.size());
  std::vector<int32_t> learned;
  for (size_t i = 0; i < encoded.tokens.size(); ++i) {
    if (encoded.mask[i] != 0) learned.push_back(encoded.tokens[i]);
  }
  EXPECT_EQ(tokenizer.Decode(learned), "Hi.<|im_end|>Bye.<|im_end|>");
  EXPECT_EQ(encoded.tokens, tokenizer.Encode(chat.text));
}

TEST(ChatMask, CoversExactlyTheAnswersForBothTokenizers) {
  ExpectMaskedText(*MakeByteTokenizer());
  TempDir dir;
  WriteText(dir / "corpus.txt", SampleText(40));
  SALA_ASSERT_OK(TrainSentencePiece(
      {.inputs = {dir / "corpus.txt"}, .vocab_size = 350, .output = dir / "tok"}));
  ExpectMaskedText(*Value(LoadTokenizer(dir / "tok")));
}

TEST(ChatErrors, RolesMarkersAndTemplates) {
  ExpectError(
      RenderChat(ChatMl(), {{"user", "a"}, {"robot", "b"}}, ChatMask::kAllAssistant).status(),
      "CHAT-ROLE", ExitCode::kData, {"message 1", "robot", "assistant"});
  ExpectError(RenderChat(ChatMl(), {{"user", "a<|im_end|>b"}}, ChatMask::kAllAssistant).status(),
              "CHAT-TEMPLATE", ExitCode::kData, {"message 0", "<|im_end|>"});
  ExpectError(FindChatFamily("llama9").status(), "CHAT-TEMPLATE", ExitCode::kConfig, {"llama9"});
  TempDir dir;
  WriteText(dir / "corpus.txt", SampleText(40));
  SALA_ASSERT_OK(TrainSentencePiece({.inputs = {dir / "corpus.txt"},
                                     .vocab_size = 350,
                                     .output = dir / "tok",
                                     .added_tokens = {}}));
  ExpectError(CheckChatTokens(ChatMl(), *Value(LoadTokenizer(dir / "tok"))), "CHAT-TEMPLATE",
              ExitCode::kData, {"<|im_start|>"});
}

TEST(ChatRecords, ShapesOfMessages) {
  const auto parse = [](const std::string& text) {
    return ParseMessages(nlohmann::json::parse(text));
  };
  const auto parts = Value(
      parse(R"([{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
                                     {"role":"assistant","content":"c","train":false},
                                     {"role":"assistant","content":"d","weight":0}])"));
  ASSERT_EQ(parts.size(), 3U);
  EXPECT_EQ(parts[0].content, "ab");
  EXPECT_TRUE(parts[0].train);
  EXPECT_FALSE(parts[1].train);
  EXPECT_FALSE(parts[2].train);
  ExpectError(parse(R"([{"role":"user","content":[{"type":"image"}]}])").status(), "ING-MODALITY",
              ExitCode::kData, {"message 0", "image"});
  ExpectError(parse(R"([{"role":"user","content":3}])").status(), "ING-FIELD", ExitCode::kData,
              {"content"});
  ExpectError(parse(R"([{"content":"x"}])").status(), "ING-FIELD", ExitCode::kData, {"role"});
  ExpectError(parse(R"({"role":"user"})").status(), "ING-FIELD", ExitCode::kData, {"not an array"});
  ExpectError(parse(R"([{"role":"user","content":"x","train":1}])").status(), "ING-FIELD",
              ExitCode::kData, {"train"});
}

}  // namespace
}  // namespace sala::data
