#include "data/chat.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/file.h"

namespace sala::data {
namespace {

constexpr char kAssistant[] = "assistant";
constexpr char kOtherRenderer[] =
    "; render with the model's own template: --chat-template tokenizer, or a .jinja file";

Status TemplateError(const std::string& text) {
  return MakeError(ExitCode::kData, "CHAT-TEMPLATE", text);
}

ChatFamily MakeChatMl(const std::string& name, const std::string& default_system) {
  ChatFamily family{.name = name,
                    .roles = {},
                    .before_first = "",
                    .default_system = default_system,
                    .trim_content = false,
                    .markers = {kImStart, kImEnd},
                    .headers = {}};
  for (const char* role : {"system", "user", kAssistant, "tool"}) {
    family.roles.push_back({.name = role,
                            .prefix = std::string(kImStart) + role + "\n",
                            .start_of_content = "",
                            .end_of_turn = kImEnd,
                            .after_turn = "\n",
                            .learned = role == std::string_view(kAssistant)});
  }
  return family;
}

ChatFamily MakeLlama3() {
  ChatFamily family{
      .name = "llama3",
      .roles = {},
      .before_first = "<|begin_of_text|>",
      .default_system = "",
      .trim_content = true,
      .markers = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
      .headers = {}};
  for (const char* role : {"system", "user", kAssistant, "ipython"}) {
    family.roles.push_back(
        {.name = role,
         .prefix = "<|start_header_id|>" + std::string(role) + "<|end_header_id|>\n\n",
         .start_of_content = "",
         .end_of_turn = "<|eot_id|>",
         .after_turn = "",
         .learned = role == std::string_view(kAssistant)});
  }
  return family;
}

ChatFamily MakePlain() {
  ChatFamily family{.name = "plain",
                    .roles = {},
                    .before_first = "",
                    .default_system = "",
                    .trim_content = true,
                    .markers = {},
                    .headers = {}};
  for (const auto& [role, header] : {std::pair<const char*, const char*>{"system", "System:"},
                                     {"user", "User:"},
                                     {kAssistant, "Assistant:"},
                                     {"tool", "Tool:"}}) {
    family.roles.push_back({.name = role,
                            .prefix = header,
                            .start_of_content = " ",
                            .end_of_turn = "\n",
                            .after_turn = "",
                            .learned = role == std::string_view(kAssistant)});
    family.headers.emplace_back(header);
  }
  return family;
}

bool HasLineStartingWith(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0 || text.find("\n" + start) != std::string::npos;
}

// Keys of a message that change what it says, so that a family without them would lose meaning.
Status CheckExtra(const ChatFamily& family, const ChatMessage& message, const std::string& where) {
  if (message.extra.empty()) return OkStatus();
  const nlohmann::json extra = nlohmann::json::parse(message.extra);
  for (const char* key : {"tool_calls", "reasoning_content"}) {
    const auto value = extra.find(key);
    const bool says_nothing = value == extra.end() || value->empty() ||
                              (value->is_string() && value->get<std::string>().empty());
    if (says_nothing) continue;
    return TemplateError(where + ": the message has \"" + key + "\", which template " +
                         family.name + " cannot say" + kOtherRenderer);
  }
  return OkStatus();
}

StatusOr<const ChatRole*> CheckMessage(const ChatFamily& family, const ChatMessage& message,
                                       const std::string& where) {
  const ChatRole* role = family.FindRole(message.role);
  if (role == nullptr) {
    std::string allowed;
    for (const ChatRole& r : family.roles) allowed += (allowed.empty() ? "" : ", ") + r.name;
    return MakeError(
        ExitCode::kData, "CHAT-ROLE",
        where + ": found role \"" + Printable(message.role) + "\", expected one of " + allowed);
  }
  for (const std::string& marker : family.markers) {
    if (message.content.find(marker) != std::string::npos) {
      return TemplateError(where + ": the content contains the marker " + marker + " of template " +
                           family.name + "; remove it from the record");
    }
  }
  for (const std::string& header : family.headers) {
    if (HasLineStartingWith(message.content, header)) {
      return TemplateError(where + ": a line of the content starts with \"" + header +
                           "\", which starts a turn in template " + family.name +
                           "; change the record or use another template");
    }
  }
  SALA_RETURN_IF_ERROR(CheckExtra(family, message, where));
  return role;
}

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\n\r\f\v";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// Whether the text, white space at its end aside, ends in an added token: then that token says that
// the turn is over.
bool EndsInAddedToken(std::string_view text, const Tokenizer& tokenizer) {
  const std::string_view trimmed = Trim(text);
  const auto& added = tokenizer.added_tokens();
  return std::any_of(added.begin(), added.end(),
                     [&](const auto& token) { return trimmed.ends_with(token.first); });
}

}  // namespace

const ChatRole* ChatFamily::FindRole(const std::string& role) const {
  const auto it =
      std::find_if(roles.begin(), roles.end(), [&](const ChatRole& r) { return r.name == role; });
  return it == roles.end() ? nullptr : &*it;
}

const std::vector<ChatFamily>& ChatFamilies() {
  static const auto* families = new std::vector<ChatFamily>{
      MakeChatMl("chatml", ""), MakeChatMl("qwen2", "You are a helpful assistant."), MakeLlama3(),
      MakePlain()};
  return *families;
}

const ChatFamily& ChatMl() { return ChatFamilies().front(); }

StatusOr<const ChatFamily*> FindChatFamily(const std::string& name) {
  std::string known;
  for (const ChatFamily& family : ChatFamilies()) {
    if (name == family.name) return &family;
    known += family.name + ", ";
  }
  return MakeError(ExitCode::kConfig, "CHAT-TEMPLATE",
                   "found chat template \"" + Printable(name) + "\", expected " + known +
                       "a file that ends in .jinja, or the word tokenizer");
}

StatusOr<RenderedChat> RenderChat(const ChatFamily& family,
                                  const std::vector<ChatMessage>& messages, ChatMask mask) {
  std::vector<const ChatRole*> roles;
  size_t last_learned = messages.size();
  for (size_t i = 0; i < messages.size(); ++i) {
    SALA_ASSIGN_OR_RETURN(const ChatRole* role,
                          CheckMessage(family, messages[i], "message " + std::to_string(i)));
    roles.push_back(role);
    if (role->learned) last_learned = i;
  }
  RenderedChat out;
  out.everything = mask == ChatMask::kAllTokens;
  out.text = family.before_first;
  if (const ChatRole* system = family.FindRole("system");
      !family.default_system.empty() && (messages.empty() || messages[0].role != "system")) {
    out.text += system->prefix + system->start_of_content + family.default_system +
                system->end_of_turn + system->after_turn;
  }
  if (mask == ChatMask::kAllTokens && !out.text.empty())
    out.learned.push_back({0, static_cast<int64_t>(out.text.size())});
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    const ChatRole& role = *roles[i];
    const int64_t turn_begin = static_cast<int64_t>(out.text.size());
    out.text += role.prefix;
    const int64_t begin = static_cast<int64_t>(out.text.size());
    out.text += role.start_of_content;
    out.text += family.trim_content ? Trim(message.content) : std::string_view(message.content);
    out.text += role.end_of_turn;
    const int64_t end = static_cast<int64_t>(out.text.size());
    out.text += role.after_turn;
    if (!message.train) continue;
    if (mask == ChatMask::kAllTokens) {
      out.learned.push_back({turn_begin, static_cast<int64_t>(out.text.size())});
    } else if (role.learned && (mask == ChatMask::kAllAssistant || i == last_learned)) {
      out.learned.push_back({begin, end});
    }
  }
  return out;
}

StatusOr<std::string> RenderPrompt(const ChatFamily& family,
                                   const std::vector<ChatMessage>& messages) {
  SALA_ASSIGN_OR_RETURN(RenderedChat chat, RenderChat(family, messages, ChatMask::kAllAssistant));
  return chat.text + family.FindRole(kAssistant)->prefix;
}

EncodedChat EncodeChat(const RenderedChat& chat, const Tokenizer& tokenizer) {
  EncodedChat out;
  size_t span = 0;
  for (const Tokenizer::Piece& piece : tokenizer.EncodeWithOffsets(chat.text)) {
    while (span < chat.learned.size() && chat.learned[span].end <= piece.begin) ++span;
    const bool learned = span < chat.learned.size() && chat.learned[span].begin <= piece.begin;
    out.tokens.push_back(piece.id);
    out.mask.push_back(learned ? 1 : 0);
  }
  const bool reaches_end =
      !chat.learned.empty() && chat.learned.back().end == static_cast<int64_t>(chat.text.size());
  out.learn_eos = reaches_end && (chat.everything || !EndsInAddedToken(chat.text, tokenizer));
  return out;
}

void AddDocumentEnds(int32_t bos_id, int32_t eos_id, EncodedChat* chat) {
  if (bos_id >= 0 && (chat->tokens.empty() || chat->tokens.front() != bos_id)) {
    chat->tokens.insert(chat->tokens.begin(), bos_id);
    chat->mask.insert(chat->mask.begin(), 0);
  }
  if (eos_id >= 0 && (chat->tokens.empty() || chat->tokens.back() != eos_id)) {
    chat->tokens.push_back(eos_id);
    chat->mask.push_back(chat->learn_eos ? 1 : 0);
  }
}

Status CheckChatTokens(const ChatFamily& family, const Tokenizer& tokenizer) {
  for (const std::string& marker : family.markers) {
    if (!tokenizer.FindToken(marker).has_value()) {
      return TemplateError("template " + family.name + ": the tokenizer has no token " + marker +
                           "; add it to added_tokens.json or choose another tokenizer");
    }
  }
  return OkStatus();
}

std::vector<int32_t> TurnEndTokens(const Tokenizer& tokenizer) {
  std::vector<int32_t> ends;
  const auto& added = tokenizer.added_tokens();
  for (const ChatFamily& family : ChatFamilies()) {
    for (const ChatRole& role : family.roles) {
      const bool marker = std::find(family.markers.begin(), family.markers.end(),
                                    role.end_of_turn) != family.markers.end();
      const auto found = added.find(role.end_of_turn);
      if (role.learned && marker && found != added.end() &&
          std::find(ends.begin(), ends.end(), found->second) == ends.end())
        ends.push_back(found->second);
    }
  }
  return ends;
}

}  // namespace sala::data
