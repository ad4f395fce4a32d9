// Chat records -> text, and which of its bytes are learned. Families are described by data: what
// stands around the content of each role. Other formats are rendered by a model's own template
// (data/jinja.h); data/chat_renderer.h has both behind one call.
//
//   chatml   MiniCPM, Qwen without tools
//   qwen2    chatml with the system text of Qwen2 where a conversation has none
//   llama3   content is trimmed
//   plain    "User: Hello\nAssistant: Hi\n": needs no special token; content is trimmed
//
//   <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n
//                                                         ^^^^^^^^^^^^ learned: content and end of
//                                                         turn
//
// The space after "Assistant:" is learned too, since tokenizers join it with the first word. A
// token is learned iff its first byte lies in a learned span.
//
// Errors (65): CHAT-ROLE; CHAT-TEMPLATE (content contains a marker; tools; a marker is no token).
// (78): CHAT-TEMPLATE (unknown family).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/chat_record.h"
#include "data/tokenizer.h"

namespace sala::data {

struct ChatRole {
  std::string name;
  std::string prefix;            // never learned
  std::string start_of_content;  // learned with the content of a learned role
  std::string end_of_turn;       // likewise
  std::string after_turn;        // never learned
  bool learned = false;
};

struct ChatFamily {
  std::string name;
  std::vector<ChatRole> roles;       // allowed
  std::string before_first;          // in front of the first message
  std::string default_system;        // of a conversation that does not start with a system message
  bool trim_content = false;         // white space at both ends of a content goes
  std::vector<std::string> markers;  // must be single tokens and must not occur in a content
  std::vector<std::string> headers;  // no line of a content may start with one

  const ChatRole* FindRole(const std::string& role) const;  // nullptr: not allowed
};

const ChatFamily& ChatMl();
const std::vector<ChatFamily>& ChatFamilies();
StatusOr<const ChatFamily*> FindChatFamily(const std::string& name);

enum class ChatMask { kAllAssistant, kLastAssistant, kAllTokens };

struct ByteSpan {
  int64_t begin, end;
};

struct RenderedChat {
  std::string text;
  std::vector<ByteSpan> learned;  // rising, disjoint
  bool everything = false;        // of ChatMask::kAllTokens
};

StatusOr<RenderedChat> RenderChat(const ChatFamily& family,
                                  const std::vector<ChatMessage>& messages, ChatMask mask);

// The same text with the start of an assistant turn after it, for generation.
StatusOr<std::string> RenderPrompt(const ChatFamily& family,
                                   const std::vector<ChatMessage>& messages);

struct EncodedChat {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  // Whether the eos behind the document is to be learned: the text ends in a learned turn, and no
  // added token closes it (or everything is learned).
  bool learn_eos = false;
};
EncodedChat EncodeChat(const RenderedChat& chat, const Tokenizer& tokenizer);

// bos in front of and eos behind the tokens, where they are not there already.
void AddDocumentEnds(int32_t bos_id, int32_t eos_id, EncodedChat* chat);  // -1: none

// Tokens that end a learned turn of any family: those of its markers that do and are added tokens.
// The end of a line is no marker, also where it is an added token.
std::vector<int32_t> TurnEndTokens(const Tokenizer& tokenizer);

// Every marker of the family must be one token: CHAT-TEMPLATE otherwise.
Status CheckChatTokens(const ChatFamily& family, const Tokenizer& tokenizer);

}  // namespace sala::data
