#include "data/chat_renderer.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"

namespace sala::data {
namespace {

using json = nlohmann::ordered_json;

constexpr char kAssistant[] = "assistant";
constexpr char kWayOut[] =
    "; learn the last turn only with --chat-mask last, or change the template";

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bool StartsWith(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

// A JSON object of the folder; {} when there is no such file.
StatusOr<json> ReadObject(const std::string& path) {
  if (!PathExists(path)) return json::object();
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!parsed.is_object())
    return MakeError(ExitCode::kData, "TOK-FORMAT", path + ": not a JSON object");
  return parsed;
}

// The text of a special token: a string, or an object that has it under "content".
std::optional<std::string> TokenText(const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string())
    return value["content"].get<std::string>();
  return std::nullopt;
}

struct TokenizerFolder {
  std::string template_text;                     // "": none
  std::map<std::string, std::string> variables;  // bos_token and the like
  std::vector<std::string> special;              // texts of special tokens, without unk
};

// `tokenizer`: a folder, or a file of one.
StatusOr<TokenizerFolder> ReadFolder(const std::string& tokenizer) {
  TokenizerFolder folder;
  if (!PathExists(tokenizer)) return folder;  // the word bytes
  std::string path = tokenizer;
  if (!IsDirectory(path)) {
    const size_t slash = path.find_last_of('/');
    path = slash == std::string::npos ? "." : path.substr(0, slash);
  }
  SALA_ASSIGN_OR_RETURN(const json config, ReadObject(path + "/tokenizer_config.json"));
  SALA_ASSIGN_OR_RETURN(json all, ReadObject(path + "/special_tokens_map.json"));
  for (const auto& [key, value] : config.items()) all[key] = value;
  for (const char* key : {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
                          "cls_token", "mask_token"}) {
    if (!all.contains(key)) continue;
    const std::optional<std::string> text = TokenText(all[key]);
    if (!text || text->empty()) continue;
    folder.variables[key] = *text;
    if (std::string(key) != "unk_token") folder.special.push_back(*text);
  }
  if (all.contains("additional_special_tokens") && all["additional_special_tokens"].is_array()) {
    for (const json& value : all["additional_special_tokens"]) {
      if (const auto text = TokenText(value); text && !text->empty())
        folder.special.push_back(*text);
    }
  }
  if (PathExists(path + "/chat_template.jinja")) {
    SALA_ASSIGN_OR_RETURN(folder.template_text, ReadFile(path + "/chat_template.jinja"));
    return folder;
  }
  if (!config.contains("chat_template")) return folder;
  const json& value = config["chat_template"];
  if (value.is_string()) folder.template_text = value.get<std::string>();
  if (value.is_array()) {  // several, by name
    for (const json& item : value) {
      if (item.is_object() && item.value("name", "") == "default")
        folder.template_text = item.value("template", "");
    }
  }
  return folder;
}

// The messages as a template sees them.
std::string MessagesJson(const ChatRecord& record) {
  json messages = json::array();
  for (const ChatMessage& message : record.messages) {
    json item = {{"role", message.role}};
    if (message.content_json.empty()) {
      item["content"] = message.content;
    } else if (message.content_json != kNoContent) {
      item["content"] = json::parse(message.content_json);
    }
    if (!message.extra.empty()) {
      const json extra = json::parse(message.extra);
      for (const auto& [key, value] : extra.items()) item[key] = value;
    }
    messages.push_back(std::move(item));
  }
  return messages.dump();
}

struct Targets {
  std::vector<int64_t> assistant;  // indices of the assistant messages
  std::vector<int64_t> learned;    // those of them that are to be learned
  bool all_on = true;              // no message is switched off
};

Targets TargetsOf(const ChatRecord& record, ChatMask mask) {
  Targets targets;
  for (size_t i = 0; i < record.messages.size(); ++i) {
    const ChatMessage& message = record.messages[i];
    targets.all_on = targets.all_on && message.train;
    if (message.role == kAssistant) targets.assistant.push_back(static_cast<int64_t>(i));
  }
  for (const int64_t i : targets.assistant) {
    const bool wanted = mask != ChatMask::kLastAssistant || i == targets.assistant.back();
    if (wanted && record.messages[static_cast<size_t>(i)].train) targets.learned.push_back(i);
  }
  return targets;
}

void AddSpan(int64_t begin, int64_t end, std::vector<ByteSpan>* spans) {
  if (end > begin) spans->push_back({begin, end});
}

// Where the parts of a conversation are found by rendering it up to each of them, the work grows
// with the square of its length. This much takes seconds; a longer one would end at the time limit
// of a render, minutes later for a file of them.
Status CheckWork(const std::string& name, int64_t messages, int64_t parts) {
  constexpr int64_t kMostRenderedMessages = 2'000'000;
  if (parts * messages <= kMostRenderedMessages) return OkStatus();
  return MakeError(
      ExitCode::kData, "CHAT-TEMPLATE",
      "a conversation of " + std::to_string(messages) + " messages, of which " +
          std::to_string(parts) + " are learned: template " + name +
          " would have to be rendered up to each of them (at most " +
          std::to_string(kMostRenderedMessages) +
          " messages times learned ones are); split the conversation, learn the last turn only, "
          "or mark what is learned by {% generation %} blocks in the template");
}

Status PrefixError(const std::string& name, int64_t message, const std::string& what) {
  return MakeError(
      ExitCode::kData, "CHAT-PREFIX",
      "template " + name + ", message " + std::to_string(message) + ": " + what + kWayOut);
}

// Rule 2 of the header.
Status LearnBlocks(const std::string& name, const Targets& targets,
                   const std::vector<ByteSpan>& blocks, RenderedChat* chat) {
  if (targets.learned.size() == targets.assistant.size()) {
    for (const ByteSpan& block : blocks) AddSpan(block.begin, block.end, &chat->learned);
    return OkStatus();
  }
  if (blocks.size() != targets.assistant.size()) {
    return MakeError(ExitCode::kData, "CHAT-PREFIX",
                     "template " + name + ": found " + std::to_string(blocks.size()) +
                         " generation blocks for " + std::to_string(targets.assistant.size()) +
                         " assistant messages, so it is not known which message a block is of; "
                         "learn all of them, or change the template");
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (std::find(targets.learned.begin(), targets.learned.end(), targets.assistant[i]) !=
        targets.learned.end())
      AddSpan(blocks[i].begin, blocks[i].end, &chat->learned);
  }
  return OkStatus();
}

}  // namespace

bool IsRecordError(const Status& status) { return ErrorCodeOf(status) != "CHAT-HELPER"; }

StatusOr<std::unique_ptr<ChatRenderer>> ChatRenderer::Open(const std::string& chat_template,
                                                           const std::string& tokenizer_path,
                                                           const Tokenizer& tokenizer,
                                                           ChatMask mask) {
  std::unique_ptr<ChatRenderer> renderer(new ChatRenderer(tokenizer, mask));
  renderer->name_ = chat_template;
  if (EndsWith(chat_template, ".jinja")) {
    SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(chat_template));
    SALA_RETURN_IF_ERROR(renderer->OpenTemplate(text, tokenizer_path));
    return renderer;
  }
  if (chat_template == "tokenizer") {
    renderer->name_ = "of " + tokenizer_path;
    SALA_RETURN_IF_ERROR(renderer->OpenTemplate("", tokenizer_path));
    return renderer;
  }
  SALA_ASSIGN_OR_RETURN(renderer->family_, FindChatFamily(chat_template));
  return renderer;
}

// `text` "": that of the tokenizer's folder.
Status ChatRenderer::OpenTemplate(const std::string& text, const std::string& tokenizer_path) {
  SALA_ASSIGN_OR_RETURN(const TokenizerFolder folder, ReadFolder(tokenizer_path));
  const std::string& source = text.empty() ? folder.template_text : text;
  if (source.empty()) {
    return MakeError(ExitCode::kConfig, "CHAT-TEMPLATE",
                     tokenizer_path +
                         ": the tokenizer has no chat template (chat_template.jinja, or "
                         "chat_template in tokenizer_config.json); name a family or a .jinja file");
  }
  sha256_ = Sha256Hex(source);
  SALA_ASSIGN_OR_RETURN(template_, JinjaTemplate::Open(name_, source, folder.variables));
  special_sha256_ = Sha256Hex(DumpJson(json({folder.variables, folder.special})));
  // Where its text is the token, it stays in front: what follows is not the start of a text then.
  const std::vector<int32_t> bos_alone = {tokenizer_.bos_id()};
  const auto bos = folder.variables.find("bos_token");
  if (bos != folder.variables.end() && tokenizer_.bos_id() >= 0 &&
      tokenizer_.Encode(bos->second) != bos_alone)
    bos_text_ = bos->second;
  for (const std::string& token : folder.special) {
    if (tokenizer_.Encode(token).size() > 1) no_tokens_.push_back(token);
    markers_.push_back(token);
  }
  // Also where the folder does not call them special: they start and end turns.
  for (const ChatFamily& family : ChatFamilies()) {
    for (const std::string& marker : family.markers) {
      if (tokenizer_.added_tokens().contains(marker)) markers_.push_back(marker);
    }
  }
  return OkStatus();
}

Status ChatRenderer::CheckTokens() const {
  return family_ == nullptr ? OkStatus() : CheckChatTokens(*family_, tokenizer_);
}

StatusOr<RenderedChat> ChatRenderer::Render(const ChatRecord& record) const {
  if (family_ == nullptr) return RenderTemplate(record);
  if (!record.tools.empty()) {
    return MakeError(ExitCode::kData, "CHAT-TEMPLATE",
                     "the record has tools, which template " + name_ +
                         " cannot say; render with the model's own template: --chat-template "
                         "tokenizer, or a .jinja file");
  }
  return RenderChat(*family_, record.messages, mask_);
}

// A marker in a content would become the token that ends or starts a turn.
Status ChatRenderer::CheckContents(const ChatRecord& record) const {
  for (size_t i = 0; i < record.messages.size(); ++i) {
    for (const std::string& marker : markers_) {
      if (record.messages[i].content.find(marker) == std::string::npos) continue;
      return MakeError(ExitCode::kData, "CHAT-TEMPLATE",
                       "message " + std::to_string(i) +
                           ": the content contains the special token " + Printable(marker) +
                           "; remove it from the record");
    }
  }
  return OkStatus();
}

StatusOr<RenderedChat> ChatRenderer::RenderTemplate(const ChatRecord& record) const {
  SALA_RETURN_IF_ERROR(CheckContents(record));
  const Targets targets = TargetsOf(record, mask_);
  const auto count = static_cast<int64_t>(record.messages.size());
  const bool blocks = template_->has_generation_blocks() && mask_ != ChatMask::kAllTokens;
  const bool everything = mask_ == ChatMask::kAllTokens && targets.all_on;
  JinjaRequest request{
      .messages = MessagesJson(record), .tools = record.tools, .spans = blocks, .renders = {}};
  request.renders.push_back({count, false});
  // The parts whose borders are asked for: [before, behind] each, two renders.
  std::vector<int64_t> parts;
  if (mask_ == ChatMask::kAllTokens && !targets.all_on) {
    for (int64_t i = 0; i < count; ++i) {
      if (record.messages[static_cast<size_t>(i)].train) parts.push_back(i);
    }
  } else if (!blocks && !everything) {
    parts = targets.learned;
  }
  SALA_RETURN_IF_ERROR(CheckWork(name_, count, static_cast<int64_t>(parts.size())));
  for (const int64_t i : parts) {
    request.renders.push_back({i, mask_ != ChatMask::kAllTokens});
    request.renders.push_back({i + 1, false});
  }
  SALA_ASSIGN_OR_RETURN(JinjaAnswer answer, template_->Render(request));
  RenderedChat chat;
  chat.text = answer.texts[0];
  chat.everything = mask_ == ChatMask::kAllTokens;
  for (const std::string& text : no_tokens_) {
    const size_t from = text == bos_text_ && StartsWith(chat.text, text) ? text.size() : 0;
    if (chat.text.find(text, from) == std::string::npos) continue;
    return MakeError(ExitCode::kData, "CHAT-TEMPLATE",
                     "template " + name_ + " writes " + Printable(text) +
                         ", which is not one token of this tokenizer; add it to its added tokens");
  }
  if (everything) AddSpan(0, static_cast<int64_t>(chat.text.size()), &chat.learned);
  if (blocks) SALA_RETURN_IF_ERROR(LearnBlocks(name_, targets, answer.spans, &chat));
  for (size_t p = 0; p < parts.size(); ++p) {
    const std::string& before = answer.texts[1 + 2 * p];
    const std::string& behind = answer.texts[2 + 2 * p];
    if (!StartsWith(behind, before)) {
      return PrefixError(name_, parts[p], "its turn does not begin as the generation prompt says");
    }
    if (!StartsWith(chat.text, behind))
      return PrefixError(name_, parts[p], "later messages change how it is written");
    AddSpan(static_cast<int64_t>(before.size()), static_cast<int64_t>(behind.size()),
            &chat.learned);
  }
  return chat;
}

StatusOr<EncodedChat> ChatRenderer::Encode(const ChatRecord& record) const {
  SALA_ASSIGN_OR_RETURN(RenderedChat chat, Render(record));
  if (bos_text_.empty() || !StartsWith(chat.text, bos_text_)) return EncodeChat(chat, tokenizer_);
  const auto shift = static_cast<int64_t>(bos_text_.size());
  const bool bos_learned = !chat.learned.empty() && chat.learned[0].begin < shift;
  chat.text.erase(0, bos_text_.size());
  std::vector<ByteSpan> spans;
  for (const ByteSpan& span : chat.learned)
    AddSpan(std::max<int64_t>(0, span.begin - shift), span.end - shift, &spans);
  chat.learned = std::move(spans);
  EncodedChat encoded = EncodeChat(chat, tokenizer_);
  encoded.tokens.insert(encoded.tokens.begin(), tokenizer_.bos_id());
  encoded.mask.insert(encoded.mask.begin(), bos_learned ? 1 : 0);
  return encoded;
}

StatusOr<std::vector<int32_t>> ChatRenderer::EncodePrompt(const ChatRecord& record) const {
  std::string text;
  if (family_ != nullptr) {
    SALA_RETURN_IF_ERROR(CheckTokens());
    SALA_ASSIGN_OR_RETURN(text, RenderPrompt(*family_, record.messages));
  } else {
    SALA_RETURN_IF_ERROR(CheckContents(record));
    const auto count = static_cast<int64_t>(record.messages.size());
    SALA_ASSIGN_OR_RETURN(JinjaAnswer answer, template_->Render({.messages = MessagesJson(record),
                                                                 .tools = record.tools,
                                                                 .renders = {{count, true}}}));
    text = std::move(answer.texts[0]);
    if (!bos_text_.empty() && StartsWith(text, bos_text_)) text.erase(0, bos_text_.size());
  }
  std::vector<int32_t> ids = tokenizer_.Encode(text);
  const int32_t bos = tokenizer_.bos_id();
  if (bos >= 0 && (ids.empty() || ids[0] != bos)) ids.insert(ids.begin(), bos);
  return ids;
}

std::vector<std::string> ChatRenderer::TurnStarts() const {
  return family_ == nullptr ? std::vector<std::string>() : family_->headers;
}

}  // namespace sala::data
