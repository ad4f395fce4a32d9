// The "normalizer" of a tokenizer.json: null, Sequence, NFC, NFKC, Prepend, Replace (of a literal
// text), Lowercase and Strip.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/hf_json.h"

namespace sala::data {

// Text on its way through the tokenizer, with the way back.
struct AlignedText {
  std::string text;       // well-formed UTF-8
  bool tracked = false;   // whether `origin` is kept
  bool at_start = false;  // text[0] is (or stands before) the first byte of what was given
  // Of each byte of text: the byte of the given text where its character starts; the bytes of one
  // character that became another share it. Never falls.
  std::vector<int64_t> origin;
};

class HfNormalizer {
 public:
  // TOK-UNSUPPORTED, TOK-FORMAT.
  static StatusOr<HfNormalizer> Read(const HfNode& normalizer);

  // Safe to call from several threads.
  void Apply(AlignedText* text) const;
  bool empty() const { return steps_.empty(); }

 private:
  using Step = std::function<void(AlignedText*)>;
  Status Add(const HfNode& node);

  std::vector<Step> steps_;
};

// Puts `prefix` in front of a text that is not empty.
void PrependText(const std::string& prefix, AlignedText* text);
// Every `pattern`, which is not empty, becomes `content`.
void ReplaceText(const std::string& pattern, const std::string& content, AlignedText* text);
// Bytes that are no UTF-8 become U+FFFD.
void RepairUtf8(AlignedText* text);

}  // namespace sala::data
