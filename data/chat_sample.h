// A chat document as people read it: its text on one line, with what is learned marked.
//
//   <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n[[Hi<|im_end|>]]\n
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/status.h"
#include "data/chat_record.h"
#include "data/ingest.h"
#include "data/tokenizer.h"

namespace sala::data {

struct LearnedMarks {
  std::string begin = "[[", end = "]]";
};
inline LearnedMarks ColouredMarks() { return {"\x1b[32m", "\x1b[0m"}; }

// Control characters are escaped, so that the text is one line and does nothing to a terminal. Of a
// run of learned, or of other, tokens that is longer than `run_bytes` only the two ends are shown;
// behind `most_bytes` nothing. 0: no limit.
std::string MarkedText(const Tokenizer& tokenizer, std::span<const int32_t> tokens,
                       std::span<const uint8_t> learned, const LearnedMarks& marks,
                       int64_t run_bytes, int64_t most_bytes);

struct ChatPreview {
  ChatShape shape = ChatShape::kNone;
  std::string text;               // as rendered
  std::vector<ByteSpan> learned;  // of it
  std::vector<int32_t> tokens;    // as ingest stores them, bos and eos included
  std::vector<uint8_t> mask;
};

// Record `number` (from 0) of a file that ingest reads, as ingest with these options would make it;
// `inputs` and `output` play no part. PREVIEW-RECORD (64): no such record, or it is no chat.
StatusOr<ChatPreview> PreviewChat(const std::string& path, int64_t number,
                                  const IngestOptions& options, const Tokenizer& tokenizer);

}  // namespace sala::data
