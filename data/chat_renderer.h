// One call for both ways to make text of a conversation: the families of data/chat.h and templates
// in Jinja.
//
//   SALA_ASSIGN_OR_RETURN(auto renderer, ChatRenderer::Open("tokenizer", "models/Qwen3-0.6B",
//   *tokenizer, mask)); SALA_ASSIGN_OR_RETURN(EncodedChat chat, renderer->Encode(record));
//
// What is learned of a text made by a template, the first rule that applies:
//   1. all tokens: everything, but messages that are switched off;
//   2. the template has {% generation %} blocks: what they say, one block for each assistant
//   message;
//   3. the first i messages with the start of an assistant turn behind them must be how the first i
//   + 1 messages begin, and those how
//      the whole begins: what message i adds is learned, end of turn included. CHAT-PREFIX (65)
//      otherwise, as with templates that write earlier turns anew when later ones come; of these
//      the last turn alone can be learned.
//
// Errors: those of data/chat.h and data/jinja.h; CHAT-PREFIX (65); FILE-MISSING (66), CHAT-TEMPLATE
// (65, 78) for what is no template.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/chat.h"
#include "data/jinja.h"
#include "data/tokenizer.h"

namespace sala::data {

class ChatRenderer {
 public:
  // `chat_template`: the name of a family, a file that ends in .jinja, or the word tokenizer for
  // the template in the folder `tokenizer_path`. The tokenizer must outlive the renderer.
  static StatusOr<std::unique_ptr<ChatRenderer>> Open(const std::string& chat_template,
                                                      const std::string& tokenizer_path,
                                                      const Tokenizer& tokenizer, ChatMask mask);

  // CHAT-TEMPLATE (65) when a marker of the family is no token. To be called once there is a chat.
  Status CheckTokens() const;

  // Both may be called from several threads.
  StatusOr<RenderedChat> Render(const ChatRecord& record) const;
  StatusOr<EncodedChat> Encode(
      const ChatRecord& record) const;  // without bos and eos of the document

  // For generation: the conversation so far with the start of an assistant turn behind it. Starts
  // with bos where the tokenizer has one, whether the template writes it or not.
  StatusOr<std::vector<int32_t>> EncodePrompt(const ChatRecord& record) const;
  // How a line starts that starts a turn; empty where markers do that.
  std::vector<std::string> TurnStarts() const;

  const std::string& name() const { return name_; }      // "chatml", or that of the file
  const std::string& sha256() const { return sha256_; }  // of a template's text; "": a family
  // Of the special tokens that the tokenizer's folder names to a template; "": a family.
  const std::string& special_sha256() const { return special_sha256_; }

 private:
  ChatRenderer(const Tokenizer& tokenizer, ChatMask mask) : tokenizer_(tokenizer), mask_(mask) {}
  Status OpenTemplate(const std::string& text, const std::string& tokenizer_path);
  StatusOr<RenderedChat> RenderTemplate(const ChatRecord& record) const;
  Status CheckContents(const ChatRecord& record) const;

  const Tokenizer& tokenizer_;
  ChatMask mask_;
  std::string name_, sha256_, special_sha256_;
  const ChatFamily* family_ = nullptr;  // either this or a template
  std::unique_ptr<JinjaTemplate> template_;
  // As the template writes bos, where the tokenizer knows bos as a number only and would cut this
  // text into pieces; else "".
  std::string bos_text_;
  std::vector<std::string> markers_;    // special tokens that no content may contain
  std::vector<std::string> no_tokens_;  // special texts that the tokenizer would cut into pieces
};

// Whether a record that this error came from may be skipped: it is about the record, not about the
// machine.
bool IsRecordError(const Status& status);

}  // namespace sala::data
