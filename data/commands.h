// What the commands `data info`, `data verify` and `data show` print. Ingest, synthetic data and
// tokenizer training are plain functions of their own headers.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "data/token_store.h"

namespace sala::data {

// Several lines: counts, tokenizer, files, sources with licences, lengths; or all of dataset.json
// with the directory and the fingerprint as one JSON object.
StatusOr<std::string> DescribeDataset(const std::string& directory, bool as_json = false);

// Quick: dataset.json, sizes, headers, offsets. Full: also the SHA-256 of every file, every CRC and
// every token id. Returns one line saying what was checked, or a JSON object {"dataset",
// "fingerprint", "documents", "tokens", "files", "checked": "full" or "quick"}. A fault is an error
// in both cases.
StatusOr<std::string> VerifyDataset(const std::string& directory, bool full, bool as_json = false);

// Document `n` of the whole dataset, or of the file named ("tokens-00002.h5", or its number): ids,
// or its text when a tokenizer is given (TOK-MISMATCH when it is another one). In a chat document
// the learned tokens are marked: ids with '*', text between
// [[ and ]].
StatusOr<std::string> ShowDocument(const std::string& directory, int64_t n, const Tokenizer* decode,
                                   const std::string& file_name = "");

}  // namespace sala::data
