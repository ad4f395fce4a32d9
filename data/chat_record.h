// The conversation in a JSON record, whatever its shape.
//
//   messages   {"messages": [{"role", "content", "train"?, "weight"?}]}
//   ShareGPT   {"conversations": [{"from", "value"}], "system"?}
//   Alpaca     {"instruction", "input"?, "output", "history"?: [[user, assistant]], "system"?}
//
// The names of the turns decide between the first two, so "conversations" of role and content are
// messages too. `content` is a string or an array of {"type": "text", "text"} parts; it may be null
// or missing where the message calls a tool. "train": false or "weight": 0 switches a message off.
// `from` human, gpt, observation and function_call are user, assistant, tool and assistant. Other
// keys of a message and `tools` of a record are kept for templates that use them.
//
// Errors (65): ING-FIELD, ING-MODALITY, ING-SHAPE.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "core/status.h"

namespace sala::data {

struct ChatMessage {
  std::string role;
  std::string content;     // as text: parts joined, nothing for null
  bool train = true;       // false: never learned
  std::string extra = {};  // the other keys, as a JSON object; "": none
  // Where the record has no string for a content: its JSON (null, an array of parts), or
  // kNoContent. Templates in Jinja get this.
  std::string content_json = {};
};
inline constexpr char kNoContent[] = "absent";

struct ChatRecord {
  std::vector<ChatMessage> messages;
  std::string tools;  // JSON array as text; "": none
};

enum class ChatShape { kNone, kMessages, kShareGpt, kAlpaca };

const char* NameOf(ChatShape shape);  // "text" for kNone

// By the keys of a record (a JSON object). `turns_field` is looked for first, then "conversations".
ChatShape ShapeOf(const nlohmann::ordered_json& record, const std::string& turns_field);

// `shape` must not be kNone.
StatusOr<ChatRecord> ParseChat(const nlohmann::ordered_json& record, ChatShape shape,
                               const std::string& turns_field);

// ING-SHAPE when a chat of a file has another shape than the first record of it. Text among chats
// is another mistake (ING-KIND).
Status CheckShape(ChatShape first, ChatShape found);

// The array under the field, of shape messages.
StatusOr<std::vector<ChatMessage>> ParseMessages(const nlohmann::ordered_json& messages);

// What two records must share to be the same conversation, as text with one spelling.
std::string CanonicalText(const ChatRecord& record);

}  // namespace sala::data
