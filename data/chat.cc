#include "data/chat.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/file.h"

namespace sala::data {
namespace {

Status DataError(const char* code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

StatusOr<std::string> ParseContent(const nlohmann::json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array())
    return DataError("ING-FIELD", where + ": content is neither a string nor an array of parts");
  std::string text;
  for (const auto& part : content) {
    const std::string type = part.is_object() ? part.value("type", "") : "";
    if (type != "text") {
      return DataError("ING-MODALITY", where + ": content part of type \"" + Printable(type) +
                                           "\"; only text is read");
    }
    const auto value = part.find("text");
    if (value == part.end() || !value->is_string())
      return DataError("ING-FIELD", where + ": a text part has no string under \"text\"");
    text += value->get<std::string>();
  }
  return text;
}

std::string Prefix(const ChatFamily& family, const std::string& role) {
  return family.prefix_before_role + role + family.prefix_after_role;
}

Status CheckMessage(const ChatFamily& family, const ChatMessage& message,
                    const std::string& where) {
  if (std::find(family.roles.begin(), family.roles.end(), message.role) == family.roles.end()) {
    std::string allowed;
    for (const std::string& role : family.roles) allowed += (allowed.empty() ? "" : ", ") + role;
    return DataError("CHAT-ROLE", where + ": found role \"" + Printable(message.role) +
                                      "\", expected one of " + allowed);
  }
  for (const std::string& marker : family.markers) {
    if (message.content.find(marker) != std::string::npos) {
      return DataError("CHAT-TEMPLATE", where + ": the content contains the marker " + marker +
                                            " of template " + family.name +
                                            "; remove it from the record");
    }
  }
  return OkStatus();
}

}  // namespace

const ChatFamily& ChatMl() {
  static const ChatFamily* family = new ChatFamily{.name = "chatml",
                                                   .roles = {"system", "user", "assistant", "tool"},
                                                   .learned_role = "assistant",
                                                   .prefix_before_role = kImStart,
                                                   .prefix_after_role = "\n",
                                                   .end_of_turn = kImEnd,
                                                   .after_turn = "\n",
                                                   .markers = {kImStart, kImEnd}};
  return *family;
}

StatusOr<const ChatFamily*> FindChatFamily(const std::string& name) {
  if (name == ChatMl().name) return &ChatMl();
  return MakeError(ExitCode::kConfig, "CHAT-TEMPLATE",
                   "found chat template \"" + Printable(name) + "\", expected chatml");
}

StatusOr<std::vector<ChatMessage>> ParseMessages(const nlohmann::json& messages) {
  if (!messages.is_array()) return DataError("ING-FIELD", "messages is not an array");
  std::vector<ChatMessage> out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& item = messages[i];
    const std::string where = "message " + std::to_string(i);
    if (!item.is_object()) return DataError("ING-FIELD", where + ": not an object");
    const auto role = item.find("role");
    const auto content = item.find("content");
    if (role == item.end() || !role->is_string())
      return DataError("ING-FIELD", where + ": no string under \"role\"");
    if (content == item.end()) return DataError("ING-FIELD", where + ": no \"content\"");
    SALA_ASSIGN_OR_RETURN(std::string text, ParseContent(*content, where));
    bool train = true;
    if (const auto flag = item.find("train"); flag != item.end()) {
      if (!flag->is_boolean())
        return DataError("ING-FIELD", where + ": \"train\" is not true or false");
      train = flag->get<bool>();
    }
    if (const auto weight = item.find("weight"); weight != item.end()) {
      if (!weight->is_number() || (*weight != 0 && *weight != 1))
        return DataError("ING-FIELD", where + ": \"weight\" is not 0 or 1");
      train = train && *weight != 0;
    }
    out.push_back({role->get<std::string>(), std::move(text), train});
  }
  return out;
}

StatusOr<RenderedChat> RenderChat(const ChatFamily& family,
                                  const std::vector<ChatMessage>& messages, ChatMask mask) {
  size_t last_learned = messages.size();
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role == family.learned_role) last_learned = i;
  }
  RenderedChat out;
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& message = messages[i];
    SALA_RETURN_IF_ERROR(CheckMessage(family, message, "message " + std::to_string(i)));
    const int64_t turn_begin = static_cast<int64_t>(out.text.size());
    out.text += Prefix(family, message.role);
    const int64_t begin = static_cast<int64_t>(out.text.size());
    out.text += message.content + family.end_of_turn;
    const int64_t end = static_cast<int64_t>(out.text.size());
    out.text += family.after_turn;
    if (!message.train) continue;
    if (mask == ChatMask::kAllTokens) {
      out.learned.push_back({turn_begin, static_cast<int64_t>(out.text.size())});
    } else if (message.role == family.learned_role &&
               (mask == ChatMask::kAllAssistant || i == last_learned)) {
      out.learned.push_back({begin, end});
    }
  }
  return out;
}

StatusOr<std::string> RenderPrompt(const ChatFamily& family,
                                   const std::vector<ChatMessage>& messages) {
  SALA_ASSIGN_OR_RETURN(RenderedChat chat, RenderChat(family, messages, ChatMask::kAllAssistant));
  return chat.text + Prefix(family, family.learned_role);
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
  return out;
}

Status CheckChatTokens(const ChatFamily& family, const Tokenizer& tokenizer) {
  for (const std::string& marker : family.markers) {
    if (!tokenizer.FindToken(marker).has_value()) {
      return DataError("CHAT-TEMPLATE",
                       "template " + family.name + ": the tokenizer has no token " + marker +
                           "; add it to added_tokens.json or choose another tokenizer");
    }
  }
  return OkStatus();
}

}  // namespace sala::data
