// Megatron-LM's indexed datasets: PREFIX.idx and PREFIX.bin -> a token store.
//
//   PREFIX.idx   "MMIDIDX\0\0", u64 version 1, u8 type of a token (1 u8, 2 i8, 3 i16, 4 i32, 5 i64,
//                8 u16; 6 and 7 are floats), u64 sequences, u64 entries of the document index,
//                i32 length of each sequence, i64 byte of each in the .bin, i64 document index
//                (first sequence of each document, then their number), i8 mode of each sequence
//                (may be missing)
//   PREFIX.bin   the tokens
//
// The sequences of a document are joined. Documents without tokens are left out and counted.
// Nothing is added to or taken from the tokens; whether all documents begin with bos and end with
// eos is looked at and recorded. With a tokenizer a document's hash is that of its text, as in an
// ingest of the text; without one it is that of its ids, and the store has no tokenizer
// (kUnknownTokenizer).
//
// Errors: ING-FOREIGN (65): what the format does not allow, with file, place and numbers;
// ING-MODALITY (65): sequences that are no text; DS-RANGE (65): an id that is not in the
// vocabulary; FILE-MISSING (66); DS-EXISTS (74).
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "data/token_store.h"

namespace sala::data {

struct MegatronOptions {
  std::string prefix = {};
  std::string output = {}, name = {};
  std::string license = {}, note = {};
  int64_t vocab_size = 0;  // without a tokenizer
  int64_t shard_tokens = int64_t{256} << 20;
};
// tokenizer: may be null.
StatusOr<DatasetInfo> ImportMegatron(const MegatronOptions& options, const Tokenizer* tokenizer);

}  // namespace sala::data
