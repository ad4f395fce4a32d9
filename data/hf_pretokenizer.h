// The "pre_tokenizer" of a tokenizer.json: null, Sequence, Split, ByteLevel (as the last), Digits
// and Metaspace. Cuts a text into the pieces that the model encodes one by one.
#pragma once

#include <functional>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "data/hf_json.h"
#include "data/hf_normalizer.h"

namespace sala::data {

// Part of an AlignedText.
struct TextPiece {
  std::string_view text;
  const int64_t* origin;  // of text[0] and on; null where it is not tracked
  bool at_start;          // as in AlignedText
};

class HfPretokenizer {
 public:
  using Sink = std::function<void(const TextPiece&)>;

  // TOK-UNSUPPORTED, TOK-FORMAT.
  static StatusOr<HfPretokenizer> Read(const HfNode& pre_tokenizer);

  // Whether pieces are bytes to the model (ByteLevel). The bytes themselves are given out, not the
  // characters that the vocabulary spells them with.
  bool byte_level() const { return byte_level_; }

  // Gives the pieces in order; none is empty. Safe to call from several threads.
  void Run(const TextPiece& text, const Sink& sink) const { RunFrom(0, text, sink); }

 private:
  using Stage = std::function<void(const TextPiece&, const Sink&)>;
  Status Add(const HfNode& node);
  Status AddSplit(const HfNode& node);
  Status AddByteLevel(const HfNode& node);
  Status AddMetaspace(const HfNode& node);
  void RunFrom(size_t stage, const TextPiece& text, const Sink& sink) const;

  std::vector<Stage> stages_;
  bool byte_level_ = false;
};

}  // namespace sala::data
