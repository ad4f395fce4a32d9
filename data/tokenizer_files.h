// The small files that lie beside a tokenizer's vocabulary in an exported model.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/tokenizer.h"

namespace sala::data {

inline constexpr char kHfTokenizerFile[] = "tokenizer.json";
inline constexpr char kSentencePieceFile[] = "tokenizer.model";
inline constexpr char kAddedTokensFile[] = "added_tokens.json";
inline constexpr char kByteTokenizerFile[] = "byte_tokenizer.json";

// Every file of a tokenizer that a model folder may hold, also those that are not read here: other
// programs need them.
inline constexpr std::array<const char*, 11> kTokenizerFiles = {kSentencePieceFile,
                                                                kAddedTokensFile,
                                                                kByteTokenizerFile,
                                                                kHfTokenizerFile,
                                                                "vocab.json",
                                                                "merges.txt",
                                                                "vocab.txt",
                                                                "tokenizer_config.json",
                                                                "chat_template.jinja",
                                                                "chat_template.json",
                                                                "special_tokens_map.json"};

// Those of them that are in `from`, but not `without`, copied byte for byte; returns their names.
StatusOr<std::vector<std::string>> CopyTokenizerFiles(const std::string& from,
                                                      const std::string& to,
                                                      const std::string& without = {});

struct TokenizerConfigFields {
  std::string tokenizer_class;
  std::string unk, bos, eos, pad;  // "": none
};

// tokenizer_config.json and special_tokens_map.json; a file that exists is left alone.
Status WriteTokenizerConfigs(const Tokenizer& tokenizer, const std::string& directory,
                             const TokenizerConfigFields& fields);

}  // namespace sala::data
