// The tokenizer of a SentencePiece model with added tokens (data/tokenizer.h).
#pragma once

#include <memory>
#include <string>

#include "core/status.h"
#include "data/tokenizer.h"

namespace sala::data {

// `path`: the model file; added_tokens.json beside it is read if it exists.
StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePieceTokenizer(const std::string& path);

}  // namespace sala::data
