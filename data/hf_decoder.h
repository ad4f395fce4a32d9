// The "decoder" of a tokenizer.json: null, Sequence, ByteLevel, ByteFallback, Fuse, Replace (of a
// literal text), Strip and Metaspace. Turns pieces back into text.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/hf_json.h"

namespace sala::data {

class HfDecoder {
 public:
  // TOK-UNSUPPORTED, TOK-FORMAT.
  static StatusOr<HfDecoder> Read(const HfNode& decoder);

  // The text of a row of pieces. Bytes that are no UTF-8 stay as they are.
  std::string Decode(std::vector<std::string> pieces) const;
  // What one piece adds in the middle of a text.
  std::string DecodePiece(const std::string& piece) const;

 private:
  using Pieces = std::vector<std::string>;
  struct Step {
    std::function<void(Pieces*)> run;
    bool ends_only;  // touches the ends of the whole text
  };
  Status Add(const HfNode& node, bool* fused);
  std::vector<Step> steps_;
  std::string between_;  // what joins the pieces that are left
};

}  // namespace sala::data
