#include "data/record_encoder.h"

#include <algorithm>
#include <utility>

#include "core/hash.h"

namespace sala::data {

StatusOr<RecordEncoder> RecordEncoder::Make(const IngestOptions& options,
                                            const Tokenizer& tokenizer) {
  RecordEncoder encoder(options, tokenizer);
  SALA_ASSIGN_OR_RETURN(encoder.chats_,
                        ChatRenderer::Open(options.chat_template, options.tokenizer_path, tokenizer,
                                           options.chat_mask));
  return encoder;
}

Status RecordEncoder::Encode(const CheckedRecord& record, EncodedRecord* out) const {
  EncodedChat document;
  out->learned = true;
  if (record.is_chat()) {
    SALA_ASSIGN_OR_RETURN(document, chats_->Encode(record.chat));
    out->hash = Xxh3(CanonicalText(record.chat));
    out->learned = std::find(document.mask.begin(), document.mask.end(), 1) != document.mask.end();
  } else {
    document.tokens = tokenizer_.Encode(record.text);
    out->hash = Xxh3(record.text);
  }
  if (!document.tokens.empty()) {
    AddDocumentEnds(options_.add_bos ? tokenizer_.bos_id() : -1,
                    options_.add_eos ? tokenizer_.eos_id() : -1, &document);
  }
  if (!record.is_chat()) document.mask.clear();  // of text every token is learned
  out->tokens = std::move(document.tokens);
  out->mask = std::move(document.mask);
  return OkStatus();
}

}  // namespace sala::data
