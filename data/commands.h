// What the commands `data info`, `data verify` and `data show` print. Ingest, synthetic data and
// tokenizer training are plain functions of their own headers.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "data/token_store.h"

namespace sala::data {

// Several lines: counts, tokenizer, files, sources with licences, lengths.
StatusOr<std::string> DescribeDataset(const std::string& directory);

// Quick: dataset.json, sizes, headers, offsets. Full: also the SHA-256 of every file, every CRC and
// every token id. Returns one line saying what was checked.
StatusOr<std::string> VerifyDataset(const std::string& directory, bool full);

// Document `n` of the whole dataset: ids, or its text when a tokenizer is given (TOK-MISMATCH when
// it is another one). In a chat document the learned tokens are marked: ids with '*', text between
// [[ and ]].
StatusOr<std::string> ShowDocument(const std::string& directory, int64_t n,
                                   const Tokenizer* decode);

}  // namespace sala::data
