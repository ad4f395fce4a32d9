// Chat records -> text, and which of its bytes are learned. Families are described by data: what
// stands around the content of each role. Shipped: chatml (MiniCPM, Qwen without tools).
//
//   <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n
//                                                         ^^^^^^^^^^^^ learned: content and end of
//                                                         turn
//
// Errors (65): CHAT-ROLE, CHAT-TEMPLATE (content contains a marker; unknown family), ING-FIELD,
// ING-MODALITY.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/tokenizer.h"

namespace sala::data {

struct ChatMessage {
  std::string role;
  std::string content;
  bool train = true;  // false: never learned
};

struct ChatFamily {
  std::string name;
  std::vector<std::string> roles;  // allowed
  std::string learned_role;        // "assistant"
  std::string prefix_before_role, prefix_after_role;
  std::string end_of_turn;           // learned after the content of the learned role
  std::string after_turn;            // not learned
  std::vector<std::string> markers;  // must be single tokens and must not occur in a content
};

const ChatFamily& ChatMl();
StatusOr<const ChatFamily*> FindChatFamily(const std::string& name);

enum class ChatMask { kAllAssistant, kLastAssistant, kAllTokens };

struct ByteSpan {
  int64_t begin, end;
};

struct RenderedChat {
  std::string text;
  std::vector<ByteSpan> learned;  // rising, disjoint
};

// {"messages": [{"role", "content", "train"?, "weight"?}]}: the array under the field. `content` is
// a string or an array of
// {"type": "text", "text": ...} parts.
StatusOr<std::vector<ChatMessage>> ParseMessages(const nlohmann::json& messages);

StatusOr<RenderedChat> RenderChat(const ChatFamily& family,
                                  const std::vector<ChatMessage>& messages, ChatMask mask);

// The same text with the start of an assistant turn after it, for generation.
StatusOr<std::string> RenderPrompt(const ChatFamily& family,
                                   const std::vector<ChatMessage>& messages);

// A token is learned iff its first byte lies in a learned span.
struct EncodedChat {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
};
EncodedChat EncodeChat(const RenderedChat& chat, const Tokenizer& tokenizer);

// Every marker of the family must be one token: CHAT-TEMPLATE otherwise.
Status CheckChatTokens(const ChatFamily& family, const Tokenizer& tokenizer);

}  // namespace sala::data
