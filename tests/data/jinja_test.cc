// Templates in Jinja: what is rendered, what is learned, and what goes wrong.
#include "data/jinja.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <nlohmann/json.hpp>
#include <thread>

#include "data/chat_renderer.h"
#include "data/ingest.h"
#include "tests/data/test_data.h"

namespace sala::data {
namespace {

constexpr char kMl[] =
    "{%- for m in messages %}\n"
    "    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n";
// The thoughts of earlier turns go when a later question comes.
constexpr char kForgetful[] =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

const std::vector<ChatMessage> kTalk = {{"system", "Be brief."},
                                        {"user", "Hello"},
                                        {"assistant", "Hi \xf0\x9f\x98\x80."},
                                        {"user", "And?"},
                                        {"assistant", "Bye."}};

class JinjaTest : public ::testing::Test {
 protected:
  StatusOr<std::unique_ptr<ChatRenderer>> Open(const std::string& text,
                                               ChatMask mask = ChatMask::kAllAssistant) {
    WriteText(dir_ / "t.jinja", text);
    return ChatRenderer::Open(dir_ / "t.jinja", "bytes", *tokenizer_, mask);
  }
  StatusOr<RenderedChat> Render(const std::string& text, const std::vector<ChatMessage>& messages,
                                ChatMask mask = ChatMask::kAllAssistant,
                                const std::string& tools = "") {
    SALA_ASSIGN_OR_RETURN(const auto renderer, Open(text, mask));
    return renderer->Render({messages, tools});
  }
  // The learned parts, joined by '|'.
  static std::string Learned(const StatusOr<RenderedChat>& chat) {
    if (!chat.ok()) return MessageOf(chat.status());
    std::string out;
    for (const ByteSpan& span : chat->learned)
      out +=
          (out.empty() ? "" : "|") + chat->text.substr(static_cast<size_t>(span.begin),
                                                       static_cast<size_t>(span.end - span.begin));
    return out;
  }
  static std::string Text(const StatusOr<RenderedChat>& chat) {
    return chat.ok() ? chat->text : MessageOf(chat.status());
  }

  TempDir dir_;
  std::unique_ptr<Tokenizer> tokenizer_ = MakeByteTokenizer();
};

TEST_F(JinjaTest, SameTextAndMaskAsTheFamily) {
  for (const ChatMask mask :
       {ChatMask::kAllAssistant, ChatMask::kLastAssistant, ChatMask::kAllTokens}) {
    const RenderedChat expected = Value(RenderChat(ChatMl(), kTalk, mask));
    const auto found = Render(kMl, kTalk, mask);
    EXPECT_EQ(Text(found), expected.text);
    if (mask == ChatMask::kAllTokens) {
      EXPECT_EQ(Learned(found), expected.text);
      continue;
    }
    // The prefix rule also takes the newline that closes a turn.
    std::string with_newlines;
    for (const ByteSpan& span : expected.learned) {
      with_newlines += (with_newlines.empty() ? "" : "|") +
                       expected.text.substr(static_cast<size_t>(span.begin),
                                            static_cast<size_t>(span.end - span.begin) + 1);
    }
    EXPECT_EQ(Learned(found), with_newlines);
  }
}

TEST_F(JinjaTest, MessagesThatAreSwitchedOff) {
  auto talk = kTalk;
  talk[2].train = false;
  EXPECT_EQ(Learned(Render(kMl, talk)), "Bye.<|im_end|>\n");
  EXPECT_EQ(Learned(Render(kMl, talk, ChatMask::kAllTokens)),
            "<|im_start|>system\nBe brief.<|im_end|>\n|<|im_start|>user\nHello<|im_end|>\n|"
            "<|im_start|>user\nAnd?<|im_end|>\n|<|im_start|>assistant\nBye.<|im_end|>\n");
  talk[4].train = false;
  EXPECT_EQ(Learned(Render(kMl, talk)), "");
}

TEST_F(JinjaTest, GenerationBlocks) {
  const std::string blocks =
      "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
      "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
      "{% endfor %}";
  EXPECT_EQ(Learned(Render(blocks, kTalk)), "Hi \xf0\x9f\x98\x80.|Bye.");
  EXPECT_EQ(Text(Render(blocks, kTalk)),
            "[system]Be brief.[user]Hello[assistant]Hi \xf0\x9f\x98\x80.[user]And?[assistant]Bye.");
  EXPECT_EQ(Learned(Render(blocks, kTalk, ChatMask::kLastAssistant)), "Bye.");
  auto talk = kTalk;
  talk[4].train = false;
  EXPECT_EQ(Learned(Render(blocks, talk)), "Hi \xf0\x9f\x98\x80.");
  const std::string one_block =
      "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}";
  ExpectError(Render(one_block, talk).status(), "CHAT-PREFIX", ExitCode::kData,
              {"1 generation blocks", "2 assistant"});
  const std::string counted =
      "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}"
      "{{ x | length }}{{ messages[0].content }}";
  ExpectError(Render(counted, kTalk).status(), "CHAT-TEMPLATE", ExitCode::kData,
              {"generation blocks"});
}

TEST_F(JinjaTest, TemplatesThatRewriteEarlierTurns) {
  const std::vector<ChatMessage> talk = {{"user", "a"},
                                         {"assistant", "<think>x</think>b"},
                                         {"user", "c"},
                                         {"assistant", "<think>y</think>d"}};
  ExpectError(Render(kForgetful, talk).status(), "CHAT-PREFIX", ExitCode::kData,
              {"t.jinja", "message 1", "--chat-mask last"});
  EXPECT_EQ(Learned(Render(kForgetful, talk, ChatMask::kLastAssistant)),
            "<think>y</think>d<|im_end|>\n");
  const std::string other_prompt =
      "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
      "{% if add_generation_prompt %}answer{% endif %}";
  ExpectError(Render(other_prompt, talk).status(), "CHAT-PREFIX", ExitCode::kData,
              {"message 1", "generation prompt"});
}

TEST_F(JinjaTest, TheEnvironmentOfChatTemplates) {
  EXPECT_EQ(Text(Render("{{ tools | tojson }}{{ messages[0].name }}",
                        {{.role = "user", .content = "x", .extra = R"({"name":"n"})"}},
                        ChatMask::kAllTokens, R"([{"z":"<\u00e9>","a":1}])")),
            "[{\"z\": \"<\xc3\xa9>\", \"a\": 1}]n");
  const std::string year = Text(Render("{{ strftime_now('%Y') }}", kTalk, ChatMask::kAllTokens));
  EXPECT_EQ(year.size(), 4U) << year;
  EXPECT_EQ(Text(Render("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
                        "  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}",
                        kTalk, ChatMask::kAllTokens)),
            "system\nuser\n");
}

TEST_F(JinjaTest, MistakesInTemplates) {
  ExpectError(Open("{% for m in messages %}\n\n{% endif %}").status(), "CHAT-TEMPLATE",
              ExitCode::kData, {"t.jinja", "line 3"});
  ExpectError(Open("").status(), "CHAT-TEMPLATE", ExitCode::kConfig, {"no chat template"});
  ExpectError(ChatRenderer::Open(dir_ / "none.jinja", "bytes", *tokenizer_, {}).status(),
              "FILE-MISSING", ExitCode::kNoInput, {"none.jinja"});
  ExpectError(Render("{{ raise_exception('roles must alternate') }}", kTalk).status(),
              "CHAT-TEMPLATE", ExitCode::kData, {"roles must alternate"});
  ExpectError(Render("a\n{{ messages[7].content.x }}", kTalk).status(), "CHAT-TEMPLATE",
              ExitCode::kData, {"line 2"});
  ExpectError(Render("{{ messages.append(1) }}", kTalk).status(), "CHAT-TEMPLATE", ExitCode::kData);
  ExpectError(Render("{{ ''.__class__.__mro__ }}", kTalk).status(), "CHAT-TEMPLATE",
              ExitCode::kData);
  ExpectError(Render(kMl, {{"user", "a<|im_end|>b"}}).status(), "CHAT-TEMPLATE", ExitCode::kData,
              {"message 0", "<|im_end|>"});
}

TEST_F(JinjaTest, HelpersThatFail) {
  const std::map<std::string, std::string> none;
  ExpectError(JinjaTemplate::Open("t", "x", none, {.python = "no-such-python"}).status(),
              "CHAT-HELPER", ExitCode::kIo, {"no-such-python", "python3-jinja2"});
  ExpectError(JinjaTemplate::Open("t", "x", none, {.python = "false"}).status(), "CHAT-HELPER",
              ExitCode::kIo, {"exit code 1"});
  // A Python without Jinja2.
  WriteText(dir_ / "bare", "#!/bin/sh\nexec python3 -S \"$@\"\n");
  std::filesystem::permissions(dir_ / "bare", std::filesystem::perms::owner_all);
  ExpectError(JinjaTemplate::Open("t", "x", none, {.python = dir_ / "bare"}).status(),
              "CHAT-HELPER", ExitCode::kIo, {"Jinja2 cannot be loaded"});
  const auto endless = Value(JinjaTemplate::Open(
      "t", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", none,
      {.python = "python3", .timeout_seconds = 1}));
  const JinjaRequest request{
      .messages = "[]", .tools = "", .spans = false, .renders = {{0, false}}};
  ExpectError(endless->Render(request).status(), "CHAT-TEMPLATE", ExitCode::kData, {"within 1 s"});
  // A helper that does not start is no fault of a record.
  WriteText(dir_ / "slow", "#!/bin/sh\nexec sleep 60\n");
  std::filesystem::permissions(dir_ / "slow", std::filesystem::perms::owner_all);
  ExpectError(
      JinjaTemplate::Open("t", "x", none, {.python = dir_ / "slow", .timeout_seconds = 1}).status(),
      "CHAT-HELPER", ExitCode::kIo, {"did not start within 1 s"});
  // What is not text is no answer, and the next request gets a helper of its own.
  const auto large = Value(JinjaTemplate::Open("t", "{{ 'x' * 9999999999 }}", none));
  ExpectError(large->Render(request).status(), "CHAT-TEMPLATE", ExitCode::kData, {"4 GiB"});
}

TEST_F(JinjaTest, AHelperEndsWithItsProgramAlsoWhileItRenders) {
  WriteText(dir_ / "python",
            "#!/bin/sh\necho $$ > '" + (dir_ / "pid") + "'\nexec python3 \"$@\"\n");
  std::filesystem::permissions(dir_ / "python", std::filesystem::perms::owner_all);
  // The helper becomes a child of this process when the program between is gone.
  ASSERT_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
  std::array<int, 2> ready{};
  ASSERT_EQ(pipe2(ready.data(), O_CLOEXEC), 0);
  const pid_t program = fork();
  if (program == 0) {
    const auto endless = JinjaTemplate::Open(
        "t", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {},
        {.python = dir_ / "python", .timeout_seconds = 300});
    if (!endless.ok() || write(ready[1], "x", 1) != 1) _exit(1);
    (*endless)
        ->Render({.messages = "[]", .tools = "", .spans = false, .renders = {{0, false}}})
        .status()
        .IgnoreError();
    _exit(0);
  }
  close(ready[1]);
  char byte = 0;
  EXPECT_EQ(read(ready[0], &byte, 1), 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(500));  // now it renders
  kill(program, SIGKILL);
  EXPECT_EQ(waitpid(program, nullptr, 0), program);
  const pid_t helper = std::stoi(ReadText(dir_ / "pid"));
  pid_t ended = 0;
  for (int tries = 0; tries < 300 && ended == 0; ++tries) {
    ended = waitpid(helper, nullptr, WNOHANG);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  EXPECT_EQ(ended, helper);
  if (ended == 0) kill(helper, SIGKILL);
  close(ready[0]);
  EXPECT_EQ(prctl(PR_SET_CHILD_SUBREAPER, 0), 0);
}

TEST_F(JinjaTest, SeveralThreads) {
  const auto renderer = Value(Open(kMl));
  std::vector<std::string> learned(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < learned.size(); ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        const std::string answer = std::to_string(t) + "/" + std::to_string(i);
        learned[t] += Learned(renderer->Render({{{"user", "q"}, {"assistant", answer}}, ""})) ==
                              answer + "<|im_end|>\n"
                          ? "."
                          : "X";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(learned, ::testing::Each(std::string(20, '.')));
}

TEST_F(JinjaTest, TheTemplateOfATokenizer) {
  std::filesystem::create_directories(dir_ / "tok");
  WriteText(dir_ / "tok/byte_tokenizer.json", "{}");
  WriteText(dir_ / "tok/tokenizer_config.json",
            R"({"bos_token":{"content":"<s>"},"eos_token":"</s>","unk_token":null,
                "chat_template":[{"name":"tool_use","template":"no"},
                  {"name":"default","template":"{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"}]})");
  const auto open = [&](ChatMask mask) {
    return ChatRenderer::Open("tokenizer", dir_ / "tok", *tokenizer_, mask);
  };
  const ChatRecord record{{{"user", "hi"}}, ""};
  const auto renderer = Value(open(ChatMask::kAllTokens));
  ExpectError(renderer->Render(record).status(), "CHAT-TEMPLATE", ExitCode::kData,
              {"writes </s>", "not one token"});
  // A file of its own comes first. The byte tokenizer knows <s> as a number only.
  WriteText(dir_ / "tok/chat_template.jinja", "{{ bos_token }}{{ messages[0].content }}");
  SALA_ASSERT_OK(
      ChatRenderer::Open("tokenizer", dir_ / "tok/byte_tokenizer.json", *tokenizer_, {}).status());
  const EncodedChat chat = Value(Value(open(ChatMask::kAllTokens))->Encode(record));
  EXPECT_EQ(chat.tokens, (std::vector<int32_t>{256, 'h', 'i'}));
  EXPECT_EQ(chat.mask, (std::vector<uint8_t>{1, 1, 1}));
  EXPECT_TRUE(chat.learn_eos);
  ExpectError(Value(open({}))->Render({{{"user", "a</s>"}}, ""}).status(), "CHAT-TEMPLATE",
              ExitCode::kData, {"</s>"});
  ExpectError(ChatRenderer::Open("tokenizer", "bytes", *tokenizer_, {}).status(), "CHAT-TEMPLATE",
              ExitCode::kConfig, {"no chat template"});
}

ChatRecord Parsed(const std::string& text) {
  return Value(ParseChat(nlohmann::ordered_json::parse(text), ChatShape::kMessages, "messages"));
}

TEST_F(JinjaTest, ContentsReachATemplateAsTheRecordHasThem) {
  const ChatRecord record = Parsed(
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
          {"role":"assistant","content":null,"tool_calls":[1]},
          {"role":"assistant","tool_calls":[1]},{"role":"assistant","content":"c"}]})");
  const auto rendered = [&](const std::string& text) {
    return Value(Value(Open(text))->Render(record)).text;
  };
  const std::string what =
      "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
      "{% elif m.content is none %}null{% elif m.content is defined %}"
      "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% else %}absent{% endif %};"
      "{% endfor %}";
  // It reads texts, so it gets one, whatever it would make of a list.
  EXPECT_EQ(rendered(what), "ab;null;absent;c;");
  // Of families a text, as ever.
  EXPECT_EQ(record.messages[0].content, "ab");
  EXPECT_EQ(record.messages[1].content, "");
}

TEST_F(JinjaTest, NoPartOfAListIsLost) {
  const ChatRecord two = Parsed(
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]},
          {"role":"assistant","content":[{"type":"text","text":"c"},{"type":"text","text":"d"}]}]})");
  const ChatRecord one = Parsed(
      R"({"messages":[{"role":"user","content":[{"type":"text","text":"a"}]},
          {"role":"assistant","content":[{"type":"text","text":"c"}]}]})");
  const auto turns = [](const std::string& user, const std::string& assistant) {
    return "{% for m in messages %}{% if m.role == 'user' %}[" + user + "]{% else %}<" + assistant +
           ">{% endif %}{% endfor %}{% if add_generation_prompt %}<{% endif %}";
  };
  const auto render = [&](const std::string& text, const ChatRecord& record) {
    return Value(Open(text))->Render(record);
  };
  const std::string text = "{{ m.content }}";
  const std::string list = "{% for part in m.content %}{{ part.text }};{% endfor %}";
  const std::string either =
      "{% if m.content is string %}{{ m.content }}{% else %}" + list + "{% endif %}";
  const std::string first = "{{ m.content[0].text }}";
  const std::string strict = "{{ m.content[0].text.strip() }}";  // an error of a text
  struct Case {
    std::string user, assistant, expected, learned;
  };
  for (const Case& good : std::vector<Case>{{text, text, "[ab]<cd>", "cd>"},
                                            {either, text, "[ab]<cd>", "cd>"},
                                            {text, either, "[ab]<cd>", "cd>"},
                                            {list, text, "[a;b;]<cd>", "cd>"},
                                            {list, list, "[a;b;]<c;d;>", "c;d;>"},
                                            {"", text, "[]<cd>", "cd>"}}) {
    const auto chat = render(turns(good.user, good.assistant), two);
    EXPECT_EQ(Text(chat), good.expected);
    EXPECT_EQ(Learned(chat), good.learned);
  }
  for (const std::string& reads : {first, strict}) {
    EXPECT_EQ(Text(render(turns(reads, text), one)), "[a]<c>");
    ExpectError(render(turns(reads, text), two).status(), "CHAT-TEMPLATE", ExitCode::kData,
                {"message 0", "only in part", "one string"});
    ExpectError(render(turns(text, reads), two).status(), "CHAT-TEMPLATE", ExitCode::kData,
                {"only in part", "one string"});
  }
  // Lists are read of the user alone, in a template that takes nothing else there.
  EXPECT_EQ(
      Text(render(turns("{{ m.content[0].text.strip() }}{{ m.content[1].text.strip() }}", text),
                  two)),
      "[ab]<cd>");
}

TEST_F(JinjaTest, AConversationOfThousandsOfTurnsIsRefusedAtOnce) {
  std::vector<ChatMessage> talk;
  for (int i = 0; i < 3000; ++i) {
    talk.push_back({"user", "a"});
    talk.push_back({"assistant", "b"});
  }
  const auto start = std::chrono::steady_clock::now();
  ExpectError(Render(kMl, talk).status(), "CHAT-TEMPLATE", ExitCode::kData,
              {"6000 messages, of which 3000 are learned", "generation"});
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  // What needs no search is rendered.
  EXPECT_TRUE(Render(kMl, talk, ChatMask::kLastAssistant).ok());
  EXPECT_TRUE(Render(kMl, talk, ChatMask::kAllTokens).ok());
}

TEST_F(JinjaTest, IngestKeepsToTheRules) {
  WriteText(dir_ / "t.jinja", kForgetful);
  WriteText(
      dir_ / "c.jsonl",
      R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]})"
      "\n"
      R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"</think>b"},
               {"role":"user","content":"c"},{"role":"assistant","content":"d"}]})");
  std::string lines = ReadText(dir_ / "c.jsonl");
  lines.erase(
      std::remove(lines.begin() + static_cast<int64_t>(lines.find('\n')) + 1, lines.end(), '\n'),
      lines.end());
  WriteText(dir_ / "c.jsonl", lines);
  IngestOptions options{.sources = {{.name = "s", .inputs = {dir_ / "c.jsonl"}}},
                        .output = dir_ / "out",
                        .name = "c"};
  options.chat_template = dir_ / "t.jinja";
  ExpectError(RunIngest(options, *tokenizer_).status(), "CHAT-PREFIX", ExitCode::kData,
              {"c.jsonl:2", "message 1"});
  options.rules = {{"chat", RecordRule::kSkip}};
  options.max_rejects = 1;
  const IngestReport report = Value(RunIngest(options, *tokenizer_));
  EXPECT_EQ(report.info.documents, 1);
  EXPECT_EQ(report.info.target_tokens, 3);  // b, the end of the turn, its newline
  EXPECT_EQ(report.info.ingest["chat_template"], dir_ / "t.jinja");
  EXPECT_EQ(report.info.ingest["chat_template_sha256"], Sha256Hex(kForgetful));
}

TEST_F(JinjaTest, IngestMayLeaveOutARecordThatTakesTooMuch) {
  WriteText(dir_ / "t.jinja",
            "{% if messages[0].content == 'big' %}{{ 'x' * 9999999999 }}{% endif %}"
            "{% for m in messages %}{{ m.content }}{% endfor %}");
  std::string lines;
  for (const std::string question : {"small", "big", "tiny"}) {
    lines += R"({"messages":[{"role":"user","content":")" + question +
             R"("},{"role":"assistant","content":"b"}]})" + "\n";
  }
  WriteText(dir_ / "c.jsonl", lines);
  IngestOptions options{.sources = {{.name = "s", .inputs = {dir_ / "c.jsonl"}}},
                        .output = dir_ / "out",
                        .name = "c"};
  options.chat_template = dir_ / "t.jinja";
  ExpectError(RunIngest(options, *tokenizer_).status(), "CHAT-TEMPLATE", ExitCode::kData,
              {"c.jsonl:2", "4 GiB"});
  options.rules = {{"chat", RecordRule::kSkip}};
  options.max_rejects = 1;
  EXPECT_EQ(Value(RunIngest(options, *tokenizer_)).info.documents, 2);
}

}  // namespace
}  // namespace sala::data
