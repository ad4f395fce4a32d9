// What is special about the ids of a tokenizer.json: bos, eos, pad and unk by the files beside it,
// and what its post-processor puts around a text.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/hf_json.h"

namespace sala::data {

struct HfSpecialIds {
  int32_t bos = -1, eos = -1, pad = -1, unk = -1;  // -1: none
  bool of_model = false;  // some are known from generation_config.json or config.json only
};

// No bos where tokenizer_config.json has "bos_token": null or "add_bos_token": false.
// `find`: the id of a token. TOK-FORMAT: a file is damaged, or bos or eos is no token; TOK-VOCAB:
// an id beyond the vocabulary.
StatusOr<HfSpecialIds> ReadSpecialIds(
    const std::string& directory, int64_t vocab_size,
    const std::function<std::optional<int32_t>(const std::string&)>& find);

struct HfTemplate {
  std::vector<int32_t> before, after;  // ids around those of the text
  bool text_seen = false;              // a TemplateProcessing was read

  Status Add(const HfNode& node, int64_t vocab_size);  // as ReadPostProcessor
};

// The "post_processor": null, one TemplateProcessing (what it says of single texts), ByteLevel,
// which changes no ids, and Sequence. TOK-FORMAT, TOK-UNSUPPORTED.
StatusOr<HfTemplate> ReadPostProcessor(const HfNode& post_processor, int64_t vocab_size);

}  // namespace sala::data
