// The tokenizer of a Hugging Face tokenizer.json (data/tokenizer.h). Its ids are those of the
// `tokenizers` package for the same file; what is not read here is refused, never approximated.
//
// Order of work: added tokens that are not normalized; the normalizer, on each part between them
// on its own (so what it puts in front stands in front of every part); added tokens that are
// normalized; the pre-tokenizer; the model on each piece.
#pragma once

#include <memory>
#include <string>

#include "core/status.h"
#include "data/tokenizer.h"

namespace sala::data {

// `path`: the file. bos, eos, pad and unk come from the files beside it: by name from
// tokenizer_config.json, then special_tokens_map.json; by id from generation_config.json, then
// config.json. TOK-FORMAT, TOK-UNSUPPORTED, TOK-VOCAB (65).
StatusOr<std::unique_ptr<Tokenizer>> LoadHfTokenizer(const std::string& path);

}  // namespace sala::data
