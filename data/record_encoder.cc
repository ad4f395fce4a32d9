#include "data/record_encoder.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/hash.h"

namespace sala::data {
namespace {

nlohmann::json CanonicalMessages(const std::vector<ChatMessage>& messages) {
  nlohmann::json out = nlohmann::json::array();
  for (const ChatMessage& m : messages) out.push_back({{"role", m.role}, {"content", m.content}});
  return out;
}

}  // namespace

StatusOr<RecordEncoder> RecordEncoder::Make(const IngestOptions& options,
                                            const Tokenizer& tokenizer) {
  RecordEncoder encoder(options, tokenizer);
  SALA_ASSIGN_OR_RETURN(encoder.family_, FindChatFamily(options.chat_template));
  return encoder;
}

Status RecordEncoder::EncodeChatRecord(const CheckedRecord& record, EncodedRecord* out) const {
  SALA_ASSIGN_OR_RETURN(const RenderedChat rendered,
                        RenderChat(*family_, record.messages, options_.chat_mask));
  out->hash = Xxh3(CanonicalMessages(record.messages).dump());
  EncodedChat encoded = EncodeChat(rendered, tokenizer_);
  out->tokens = std::move(encoded.tokens);
  out->mask = std::move(encoded.mask);
  out->learned = std::find(out->mask.begin(), out->mask.end(), 1) != out->mask.end();
  return OkStatus();
}

Status RecordEncoder::Encode(const CheckedRecord& record, EncodedRecord* out) const {
  out->mask.clear();
  out->learned = true;
  if (record.chat) {
    SALA_RETURN_IF_ERROR(EncodeChatRecord(record, out));
  } else {
    out->hash = Xxh3(record.text);
    out->tokens = tokenizer_.Encode(record.text);
  }
  if (out->tokens.empty()) return OkStatus();
  const bool bos = options_.add_bos && tokenizer_.bos_id() >= 0;
  const bool eos = options_.add_eos && tokenizer_.eos_id() >= 0;
  if (bos) out->tokens.insert(out->tokens.begin(), tokenizer_.bos_id());
  if (eos) out->tokens.push_back(tokenizer_.eos_id());
  if (record.chat && bos) out->mask.insert(out->mask.begin(), 0);
  // The model ends its turn with the end-of-turn marker; the eos behind the conversation is learned
  // with all_tokens only.
  if (record.chat && eos) out->mask.push_back(options_.chat_mask == ChatMask::kAllTokens ? 1 : 0);
  return OkStatus();
}

}  // namespace sala::data
