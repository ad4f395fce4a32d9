// The small files that lie beside a tokenizer's vocabulary in an exported model.
#pragma once

#include <string>

#include "core/status.h"
#include "data/tokenizer.h"

namespace sala::data {

inline constexpr char kSentencePieceFile[] = "tokenizer.model";
inline constexpr char kAddedTokensFile[] = "added_tokens.json";
inline constexpr char kByteTokenizerFile[] = "byte_tokenizer.json";

struct TokenizerConfigFields {
  std::string tokenizer_class;
  std::string unk, bos, eos, pad;  // "": none
};

// tokenizer_config.json and special_tokens_map.json; a file that exists is left alone.
Status WriteTokenizerConfigs(const Tokenizer& tokenizer, const std::string& directory,
                             const TokenizerConfigFields& fields);

}  // namespace sala::data
