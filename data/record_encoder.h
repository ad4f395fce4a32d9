// A checked record -> the tokens of its document.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/status.h"
#include "data/chat.h"
#include "data/chat_renderer.h"
#include "data/ingest.h"
#include "data/record_check.h"
#include "data/tokenizer.h"

namespace sala::data {

struct EncodedRecord {
  std::vector<int32_t> tokens;  // with bos and eos as the options say; empty: the record gives none
  std::vector<uint8_t> mask;    // of a chat, one per token
  uint64_t hash = 0;            // XXH3-64 of the text, or of CanonicalText of a chat
  bool learned = true;          // false: a chat without a token to learn
};

// May be used by several threads at once.
class RecordEncoder {
 public:
  // Errors as ChatRenderer::Open.
  static StatusOr<RecordEncoder> Make(const IngestOptions& options, const Tokenizer& tokenizer);
  const ChatRenderer& chats() const { return *chats_; }
  // Those of ChatRenderer::Encode for a chat that cannot be rendered, without its place.
  Status Encode(const CheckedRecord& record, EncodedRecord* out) const;

 private:
  RecordEncoder(const IngestOptions& options, const Tokenizer& tokenizer)
      : options_(options), tokenizer_(tokenizer) {}

  const IngestOptions& options_;
  const Tokenizer& tokenizer_;
  std::unique_ptr<ChatRenderer> chats_;
};

}  // namespace sala::data
