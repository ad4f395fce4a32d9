// A checked record -> the tokens of its document.
#pragma once

#include <cstdint>
#include <vector>

#include "core/status.h"
#include "data/chat.h"
#include "data/ingest.h"
#include "data/record_check.h"
#include "data/tokenizer.h"

namespace sala::data {

struct EncodedRecord {
  std::vector<int32_t> tokens;  // with bos and eos as the options say; empty: the record gives none
  std::vector<uint8_t> mask;    // of a chat, one per token
  uint64_t hash = 0;            // XXH3-64 of the text, or of the canonical JSON of a chat
  bool learned = true;          // false: a chat without a token to learn
};

// May be used by several threads at once.
class RecordEncoder {
 public:
  // CHAT-TEMPLATE (78) when options.chat_template names no family.
  static StatusOr<RecordEncoder> Make(const IngestOptions& options, const Tokenizer& tokenizer);
  const ChatFamily& family() const { return *family_; }
  // Whether the tokenizer can encode chats: CHAT-TEMPLATE (65).
  Status CheckChats() const { return CheckChatTokens(*family_, tokenizer_); }
  // CHAT-ROLE, CHAT-TEMPLATE (65) for a chat that cannot be rendered, without its place.
  Status Encode(const CheckedRecord& record, EncodedRecord* out) const;

 private:
  RecordEncoder(const IngestOptions& options, const Tokenizer& tokenizer)
      : options_(options), tokenizer_(tokenizer) {}
  Status EncodeChatRecord(const CheckedRecord& record, EncodedRecord* out) const;

  const IngestOptions& options_;
  const Tokenizer& tokenizer_;
  const ChatFamily* family_ = nullptr;
};

}  // namespace sala::data
