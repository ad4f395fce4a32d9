#include "data/chat_record.h"

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "core/check.h"
#include "core/file.h"

namespace sala::data {
namespace {

// Keys stay in the order of the record: templates print whole objects with tojson.
using json = nlohmann::ordered_json;

constexpr char kConversations[] = "conversations";

Status FieldError(const std::string& text) { return MakeError(ExitCode::kData, "ING-FIELD", text); }

const json* Find(const json& object, const std::string& key) {
  const auto it = object.find(key);
  return it == object.end() ? nullptr : &*it;
}

// The value at a dotted path, or null.
const json* FindDotted(const json& record, const std::string& dotted) {
  const json* at = &record;
  size_t begin = 0;
  while (at != nullptr && at->is_object()) {
    const size_t dot = dotted.find('.', begin);
    at = Find(*at, dotted.substr(begin, dot == std::string::npos ? dot : dot - begin));
    if (dot == std::string::npos) return at;
    begin = dot + 1;
  }
  return nullptr;
}

const json* TurnsOf(const json& record, const std::string& turns_field) {
  const json* turns = FindDotted(record, turns_field);
  return turns != nullptr ? turns : Find(record, kConversations);
}

StatusOr<std::string> ParseContent(const json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    return FieldError(where + ": content is neither a string nor an array of parts");
  std::string text;
  for (const auto& part : content) {
    std::string type;
    if (part.is_object() && part.contains("type") && part["type"].is_string())
      type = part["type"].get<std::string>();
    if (type != "text") {
      return MakeError(
          ExitCode::kData, "ING-MODALITY",
          where + ": content part of type \"" + Printable(type) + "\"; only text is read");
    }
    const json* value = Find(part, "text");
    if (value == nullptr || !value->is_string())
      return FieldError(where + ": a text part has no string under \"text\"");
    text += value->get<std::string>();
  }
  return text;
}

StatusOr<bool> ParseTrain(const json& item, const std::string& where) {
  bool train = true;
  if (const json* flag = Find(item, "train"); flag != nullptr) {
    if (!flag->is_boolean()) return FieldError(where + ": \"train\" is not true or false");
    train = flag->get<bool>();
  }
  if (const json* weight = Find(item, "weight"); weight != nullptr && !weight->is_null()) {
    if (!weight->is_number() || (*weight != 0 && *weight != 1))
      return FieldError(where + ": \"weight\" is not 0 or 1");
    train = train && *weight != 0;
  }
  return train;
}

// The keys of a message that are not read here, as a JSON object; "" when there are none.
std::string OtherKeys(const json& item, const std::set<std::string>& read) {
  json other = json::object();
  for (const auto& [key, value] : item.items()) {
    if (!read.contains(key) && !value.is_null()) other[key] = value;
  }
  return other.empty() ? "" : other.dump();
}

bool CallsTool(const json& item) {
  const json* calls = Find(item, "tool_calls");
  return calls != nullptr && calls->is_array() && !calls->empty();
}

struct TurnKeys {
  const char* role;
  const char* content;
};

std::string RoleOf(ChatShape shape, const std::string& name) {
  static const std::map<std::string, std::string> kShareGptRoles = {{"human", "user"},
                                                                    {"gpt", "assistant"},
                                                                    {"function_call", "assistant"},
                                                                    {"observation", "tool"}};
  if (shape != ChatShape::kShareGpt) return name;
  const auto role = kShareGptRoles.find(name);
  return role == kShareGptRoles.end() ? name : role->second;
}

StatusOr<std::vector<ChatMessage>> ParseTurns(const json& turns, ChatShape shape) {
  const TurnKeys keys =
      shape == ChatShape::kShareGpt ? TurnKeys{"from", "value"} : TurnKeys{"role", "content"};
  if (!turns.is_array())
    return FieldError(std::string("found ") + turns.type_name() + ", expected an array of turns");
  std::vector<ChatMessage> out;
  for (size_t i = 0; i < turns.size(); ++i) {
    const json& item = turns[i];
    const std::string where = "message " + std::to_string(i);
    if (!item.is_object()) return FieldError(where + ": not an object");
    const json* role = Find(item, keys.role);
    const json* content = Find(item, keys.content);
    if (role == nullptr || !role->is_string())
      return FieldError(where + ": no string under \"" + keys.role + "\"");
    ChatMessage message;
    message.role = RoleOf(shape, role->get<std::string>());
    const bool empty = content == nullptr || content->is_null();
    if (empty && !CallsTool(item))
      return FieldError(where + ": no \"" + std::string(keys.content) + "\"");
    if (!empty) {
      SALA_ASSIGN_OR_RETURN(message.content, ParseContent(*content, where));
    }
    if (content == nullptr) {
      message.content_json = kNoContent;
    } else if (!content->is_string()) {
      message.content_json = content->dump();
    }
    SALA_ASSIGN_OR_RETURN(message.train, ParseTrain(item, where));
    message.extra = OtherKeys(item, {keys.role, keys.content, "train", "weight"});
    out.push_back(std::move(message));
  }
  return out;
}

// A string of the record, "" when it is missing or null.
StatusOr<std::string> OptionalText(const json& record, const char* key) {
  const json* value = Find(record, key);
  if (value == nullptr || value->is_null()) return std::string();
  if (!value->is_string())
    return FieldError("field \"" + std::string(key) + "\" is of type " + value->type_name() +
                      ", expected a string");
  return value->get<std::string>();
}

StatusOr<std::vector<ChatMessage>> ParseAlpaca(const json& record) {
  SALA_ASSIGN_OR_RETURN(std::string prompt, OptionalText(record, "instruction"));
  SALA_ASSIGN_OR_RETURN(const std::string input, OptionalText(record, "input"));
  SALA_ASSIGN_OR_RETURN(const std::string answer, OptionalText(record, "output"));
  if (!input.empty()) prompt += (prompt.empty() ? "" : "\n") + input;
  std::vector<ChatMessage> out;
  if (const json* history = Find(record, "history"); history != nullptr && !history->is_null()) {
    if (!history->is_array()) return FieldError("field \"history\" is not an array");
    for (size_t i = 0; i < history->size(); ++i) {
      const json& pair = (*history)[i];
      if (!pair.is_array() || pair.size() != 2 || !pair[0].is_string() || !pair[1].is_string()) {
        return FieldError("history " + std::to_string(i) +
                          ": expected two strings, of the user and of the assistant");
      }
      out.push_back({.role = "user", .content = pair[0].get<std::string>()});
      out.push_back({.role = "assistant", .content = pair[1].get<std::string>()});
    }
  }
  out.push_back({.role = "user", .content = std::move(prompt)});
  out.push_back({.role = "assistant", .content = answer});
  SALA_ASSIGN_OR_RETURN(const bool train, ParseTrain(record, "record"));
  out.back().train = train;
  return out;
}

// `tools` is an array, or such an array written as a string.
StatusOr<std::string> ParseTools(const json& record) {
  const json* tools = Find(record, "tools");
  if (tools == nullptr || tools->is_null()) return std::string();
  json parsed = *tools;
  if (tools->is_string()) {
    const std::string text = tools->get<std::string>();
    if (text.empty()) return std::string();
    parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  }
  if (!parsed.is_array())
    return FieldError("field \"tools\" is neither an array nor the text of one");
  return parsed.empty() ? std::string() : parsed.dump();
}

}  // namespace

const char* NameOf(ChatShape shape) {
  switch (shape) {
    case ChatShape::kNone:
      return "text";
    case ChatShape::kMessages:
      return "messages";
    case ChatShape::kShareGpt:
      return "ShareGPT";
    case ChatShape::kAlpaca:
      return "Alpaca";
  }
  return "";
}

ChatShape ShapeOf(const json& record, const std::string& turns_field) {
  if (const json* turns = TurnsOf(record, turns_field); turns != nullptr) {
    const bool named = turns->is_array() && !turns->empty() && turns->front().is_object();
    return named && turns->front().contains("from") && !turns->front().contains("role")
               ? ChatShape::kShareGpt
               : ChatShape::kMessages;
  }
  return record.contains("instruction") && record.contains("output") ? ChatShape::kAlpaca
                                                                     : ChatShape::kNone;
}

StatusOr<ChatRecord> ParseChat(const json& record, ChatShape shape,
                               const std::string& turns_field) {
  SALA_CHECK(shape != ChatShape::kNone) << "a record of text is no chat";
  ChatRecord chat;
  if (shape == ChatShape::kAlpaca) {
    SALA_ASSIGN_OR_RETURN(chat.messages, ParseAlpaca(record));
  } else {
    SALA_ASSIGN_OR_RETURN(chat.messages, ParseTurns(*TurnsOf(record, turns_field), shape));
  }
  if (shape != ChatShape::kMessages) {
    SALA_ASSIGN_OR_RETURN(const std::string system, OptionalText(record, "system"));
    if (!system.empty())
      chat.messages.insert(chat.messages.begin(), {.role = "system", .content = system});
  }
  SALA_ASSIGN_OR_RETURN(chat.tools, ParseTools(record));
  return chat;
}

Status CheckShape(ChatShape first, ChatShape found) {
  if (first == found || first == ChatShape::kNone || found == ChatShape::kNone) return OkStatus();
  return MakeError(ExitCode::kData, "ING-SHAPE",
                   std::string("found a record of shape ") + NameOf(found) +
                       ", the first record of the file has shape " + NameOf(first) +
                       "; put each shape in files of its own");
}

StatusOr<std::vector<ChatMessage>> ParseMessages(const json& messages) {
  return ParseTurns(messages, ChatShape::kMessages);
}

std::string CanonicalText(const ChatRecord& record) {
  nlohmann::json out = nlohmann::json::array();  // sorted keys: one spelling
  for (const ChatMessage& m : record.messages) {
    out.push_back({{"role", m.role}, {"content", m.content}});
    if (!m.extra.empty()) out.back()["extra"] = m.extra;
  }
  if (!record.tools.empty()) out.push_back(record.tools);
  return out.dump();
}

}  // namespace sala::data
