#include "data/chat_record.h"

#include <nlohmann/json.hpp>

#include "tests/data/test_data.h"

namespace sala::data {
namespace {

using json = nlohmann::ordered_json;

ChatShape Shape(const std::string& text) { return ShapeOf(json::parse(text), "messages"); }

StatusOr<ChatRecord> Parse(const std::string& text, const std::string& field = "messages") {
  const json record = json::parse(text);
  return ParseChat(record, ShapeOf(record, field), field);
}

// "user: a|assistant: b", a '!' behind the role of a message that is switched off.
std::string Turns(const ChatRecord& record) {
  std::string out;
  for (const ChatMessage& m : record.messages)
    out += (out.empty() ? "" : "|") + m.role + (m.train ? "" : "!") + ": " + m.content;
  return out;
}

TEST(ChatShapes, AreTakenFromTheKeys) {
  EXPECT_EQ(Shape(R"({"messages":[{"role":"user","content":"a"}]})"), ChatShape::kMessages);
  EXPECT_EQ(Shape(R"({"messages":[]})"), ChatShape::kMessages);
  EXPECT_EQ(Shape(R"({"conversations":[{"from":"human","value":"a"}]})"), ChatShape::kShareGpt);
  EXPECT_EQ(Shape(R"({"conversations":[{"role":"user","content":"a"}]})"), ChatShape::kMessages);
  EXPECT_EQ(Shape(R"({"instruction":"a","output":"b","text":"c"})"), ChatShape::kAlpaca);
  EXPECT_EQ(Shape(R"({"instruction":"a","text":"c"})"), ChatShape::kNone);
  EXPECT_EQ(ShapeOf(json::parse(R"({"a":{"b":[{"from":"human"}]}})"), "a.b"), ChatShape::kShareGpt);
}

TEST(ChatShapes, ShareGptRolesAndSystem) {
  const ChatRecord record =
      Value(Parse(R"({"system":"S","tools":"[{\"name\":\"f\"}]","conversations":[
        {"from":"human","value":"a"},{"from":"function_call","value":"{}"},
        {"from":"observation","value":"3"},{"from":"gpt","value":"b","weight":0},
        {"from":"tool","value":"t"},{"from":"robot","value":"r"}]})"));
  EXPECT_EQ(Turns(record),
            "system: S|user: a|assistant: {}|tool: 3|assistant!: b|tool: t|robot: r");
  EXPECT_EQ(record.tools, R"([{"name":"f"}])");
}

TEST(ChatShapes, AlpacaWithHistoryInputAndSystem) {
  EXPECT_EQ(Turns(Value(Parse(R"({"instruction":"do","input":"it","output":"done",
      "system":"S","history":[["q1","a1"],["q2","a2"]]})"))),
            "system: S|user: q1|assistant: a1|user: q2|assistant: a2|user: do\nit|assistant: done");
  EXPECT_EQ(Turns(Value(Parse(R"({"instruction":"do","input":"","output":"x","history":null})"))),
            "user: do|assistant: x");
  EXPECT_EQ(Turns(Value(Parse(R"({"instruction":"","input":"in","output":"x","weight":0})"))),
            "user: in|assistant!: x");
}

TEST(ChatShapes, OtherKeysStayInTheirOrder) {
  const ChatRecord record = Value(Parse(
      R"({"messages":[{"role":"assistant","content":null,"z":1,
          "tool_calls":[{"type":"function","arguments":{"b":1,"a":2}}],"nothing":null}],
          "tools":[{"z":1,"a":2}]})"));
  EXPECT_EQ(record.messages[0].extra,
            R"({"z":1,"tool_calls":[{"type":"function","arguments":{"b":1,"a":2}}]})");
  EXPECT_EQ(record.messages[0].content, "");
  EXPECT_EQ(record.tools, R"([{"z":1,"a":2}])");
}

TEST(ChatShapes, CanonicalTextSeesToolsAndCallsButNotTraining) {
  const auto text = [](const std::string& record) { return CanonicalText(Value(Parse(record))); };
  const std::string plain = text(R"({"messages":[{"role":"user","content":"a"}]})");
  EXPECT_EQ(plain, R"([{"content":"a","role":"user"}])");
  EXPECT_EQ(plain, text(R"({"messages":[{"content":"a","role":"user","train":false}]})"));
  EXPECT_NE(plain, text(R"({"messages":[{"role":"user","content":"a","name":"n"}]})"));
  EXPECT_NE(plain, text(R"({"messages":[{"role":"user","content":"a"}],"tools":[1]})"));
}

void ExpectRefused(const std::string& record, const std::string& code, const std::string& part) {
  SCOPED_TRACE(record);
  ExpectError(Parse(record).status(), code, ExitCode::kData, {part});
}

TEST(ChatShapes, WhatIsRefused) {
  ExpectRefused(R"({"messages":"text"})", "ING-FIELD", "array of turns");
  ExpectRefused(R"({"messages":[{"role":"user","content":"x"},3]})", "ING-FIELD", "message 1");
  ExpectRefused(R"({"messages":[{"role":"user","content":null}]})", "ING-FIELD", "content");
  ExpectRefused(R"({"messages":[{"role":"user","content":"x","weight":0.5}]})", "ING-FIELD",
                "weight");
  ExpectRefused(R"({"messages":[{"role":"user","content":[{"type":7}]}]})", "ING-MODALITY",
                "only text");
  ExpectRefused(R"({"messages":[{"role":"user","content":["a"]}]})", "ING-MODALITY", "message 0");
  ExpectRefused(R"({"messages":[{"role":"user","content":"x"}],"tools":{}})", "ING-FIELD", "tools");
  ExpectRefused(R"({"messages":[{"role":"user","content":"x"}],"tools":"not JSON"})", "ING-FIELD",
                "tools");
  ExpectRefused(R"({"conversations":[{"from":"human"}]})", "ING-FIELD", "value");
  ExpectRefused(R"({"conversations":[{"from":"human","value":"x"},{"role":"user","content":"x"}]})",
                "ING-FIELD", "from");
  ExpectRefused(R"({"conversations":[{"from":"human","value":"x"}],"system":3})", "ING-FIELD",
                "system");
  ExpectRefused(R"({"instruction":1,"output":"x"})", "ING-FIELD", "instruction");
  ExpectRefused(R"({"instruction":"x","output":["x"]})", "ING-FIELD", "output");
  ExpectRefused(R"({"instruction":"x","output":"x","history":[["only one"]]})", "ING-FIELD",
                "history 0");
  ExpectRefused(R"({"instruction":"x","output":"x","history":"x"})", "ING-FIELD", "history");
}

TEST(ChatShapes, OneShapePerFile) {
  SALA_ASSERT_OK(CheckShape(ChatShape::kAlpaca, ChatShape::kAlpaca));
  SALA_ASSERT_OK(CheckShape(ChatShape::kNone, ChatShape::kAlpaca));
  ExpectError(CheckShape(ChatShape::kAlpaca, ChatShape::kShareGpt), "ING-SHAPE", ExitCode::kData,
              {"Alpaca", "ShareGPT"});
}

}  // namespace
}  // namespace sala::data
