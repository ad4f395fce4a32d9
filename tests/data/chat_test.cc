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
  SALA_ASSERT_OK(
      TrainSentencePiece({.inputs = {dir / "corpus.txt"}, .vocab_size = 350, .output = dir / "tok"})
          .status());
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
                                     .added_tokens = {}})
                     .status());
  ExpectError(CheckChatTokens(ChatMl(), *Value(LoadTokenizer(dir / "tok"))), "CHAT-TEMPLATE",
              ExitCode::kData, {"<|im_start|>"});
}

TEST(ChatRecords, ShapesOfMessages) {
  const auto parse = [](const std::string& text) {
    return ParseMessages(nlohmann::ordered_json::parse(text));
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
  ExpectError(parse(R"({"role":"user"})").status(), "ING-FIELD", ExitCode::kData,
              {"array of turns"});
  ExpectError(parse(R"([{"role":"user","content":"x","train":1}])").status(), "ING-FIELD",
              ExitCode::kData, {"train"});
}

std::string LearnedOf(const RenderedChat& chat) {
  std::string out;
  for (const ByteSpan& span : chat.learned)
    out += (out.empty() ? "" : "|") + chat.text.substr(static_cast<size_t>(span.begin),
                                                       static_cast<size_t>(span.end - span.begin));
  return out;
}

TEST(ChatFamilies, AreWhatJinjaMakesOfTheirTemplates) {
  const auto cases = nlohmann::json::parse(ReadText(SALA_TEST_DATA "/chat_goldens.json"));
  ASSERT_EQ(cases.size(), 20U);
  for (const auto& golden : cases) {
    const ChatFamily& family = *Value(FindChatFamily(golden["family"].get<std::string>()));
    std::vector<ChatMessage> messages;
    for (const auto& m : golden["messages"])
      messages.push_back({m["role"].get<std::string>(), m["content"].get<std::string>()});
    const RenderedChat chat = Value(RenderChat(family, messages, ChatMask::kLastAssistant));
    EXPECT_EQ(chat.text, golden["text"]) << family.name;
    const std::string prompt = Value(RenderPrompt(family, {messages.begin(), messages.end() - 1}));
    EXPECT_EQ(prompt, golden["prompt"]) << family.name;
    // What is learned starts where the prompt ends.
    ASSERT_EQ(chat.learned.size(), 1U);
    EXPECT_EQ(chat.learned[0].begin, static_cast<int64_t>(prompt.size())) << family.name;
    EXPECT_EQ(chat.text.substr(0, prompt.size()), prompt) << family.name;
  }
}

TEST(ChatFamilies, MaskToTheByte) {
  const auto learned = [](const char* family) {
    return LearnedOf(
        Value(RenderChat(*Value(FindChatFamily(family)), kTalk, ChatMask::kAllAssistant)));
  };
  EXPECT_EQ(learned("chatml"), "Hi.<|im_end|>|Bye.<|im_end|>");
  EXPECT_EQ(learned("qwen2"), "Hi.<|im_end|>|Bye.<|im_end|>");
  EXPECT_EQ(learned("llama3"), "Hi.<|eot_id|>|Bye.<|eot_id|>");
  EXPECT_EQ(learned("plain"), " Hi.\n| Bye.\n");
  for (const ChatFamily& family : ChatFamilies()) {
    const RenderedChat all = Value(RenderChat(family, {kTalk[1]}, ChatMask::kAllTokens));
    std::string joined = LearnedOf(all);
    std::erase(joined, '|');
    std::string text = all.text;
    std::erase(text, '|');
    EXPECT_EQ(joined, text) << family.name;
  }
}

TEST(ChatFamilies, PlainNeedsNoTokensAndRefusesWhatLooksLikeATurn) {
  const ChatFamily& plain = *Value(FindChatFamily("plain"));
  TempDir dir;
  WriteText(dir / "corpus.txt", SampleText(40));
  SALA_ASSERT_OK(TrainSentencePiece({.inputs = {dir / "corpus.txt"},
                                     .vocab_size = 350,
                                     .output = dir / "tok",
                                     .added_tokens = {}})
                     .status());
  const auto tokenizer = Value(LoadTokenizer(dir / "tok"));
  SALA_ASSERT_OK(CheckChatTokens(plain, *tokenizer));
  // A line ends in every answer: that token ends no turn.
  SALA_ASSERT_OK(TrainSentencePiece({.inputs = {dir / "corpus.txt"},
                                     .vocab_size = 352,
                                     .output = dir / "lines",
                                     .added_tokens = {kImEnd, "\n"}})
                     .status());
  const auto lines = Value(LoadTokenizer(dir / "lines"));
  ASSERT_TRUE(lines->added_tokens().contains("\n"));
  EXPECT_THAT(TurnEndTokens(*lines), ::testing::ElementsAre(lines->FindToken(kImEnd)));
  const RenderedChat chat = Value(RenderChat(plain, kTalk, ChatMask::kAllAssistant));
  EncodedChat encoded = EncodeChat(chat, *tokenizer);
  EXPECT_TRUE(encoded.learn_eos);  // nothing else says that the answer is over
  AddDocumentEnds(tokenizer->bos_id(), tokenizer->eos_id(), &encoded);
  EXPECT_EQ(encoded.tokens.front(), tokenizer->bos_id());
  EXPECT_EQ(encoded.tokens.back(), tokenizer->eos_id());
  EXPECT_EQ(encoded.mask.back(), 1);
  std::vector<int32_t> learned;
  for (size_t i = 0; i < encoded.tokens.size(); ++i) {
    if (encoded.mask[i] != 0) learned.push_back(encoded.tokens[i]);
  }
  EXPECT_THAT(tokenizer->Decode(learned), ::testing::MatchesRegex(" ?Hi\\.\n Bye\\.\n"));
  for (const char* content : {"User: x", "a\nAssistant: b", "Tool:"}) {
    ExpectError(RenderChat(plain, {{"user", content}}, {}).status(), "CHAT-TEMPLATE",
                ExitCode::kData, {"message 0", "starts a turn"});
  }
  SALA_ASSERT_OK(RenderChat(plain, {{"user", "the User: and more"}}, {}).status());
}

TEST(ChatFamilies, BosAndEosAreThereOnce) {
  EncodedChat chat{.tokens = {1, 5, 2}, .mask = {0, 1, 1}};
  AddDocumentEnds(1, 2, &chat);
  EXPECT_EQ(chat.tokens, (std::vector<int32_t>{1, 5, 2}));
  AddDocumentEnds(7, -1, &chat);
  EXPECT_EQ(chat.tokens, (std::vector<int32_t>{7, 1, 5, 2}));
  EXPECT_EQ(chat.mask, (std::vector<uint8_t>{0, 0, 1, 1}));
  AddDocumentEnds(-1, 9, &chat);
  EXPECT_EQ(chat.mask, (std::vector<uint8_t>{0, 0, 1, 1, 0}));
}

TEST(ChatFamilies, ToolsAreForTemplates) {
  ExpectError(
      RenderChat(ChatMl(),
                 {{.role = "assistant", .content = "", .extra = R"({"tool_calls":[{}]})"}}, {})
          .status(),
      "CHAT-TEMPLATE", ExitCode::kData, {"tool_calls", "--chat-template"});
  SALA_ASSERT_OK(
      RenderChat(ChatMl(),
                 {{.role = "user", .content = "", .extra = R"({"name":"n","tool_calls":[]})"}}, {})
          .status());
}

}  // namespace
}  // namespace sala::data
