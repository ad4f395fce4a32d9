// One tokens-*.h5 file of a token store: layout on disk. HDF5 is used to write it and, once per
// file, to learn where its arrays lie; training reads a plain map of the file.
//
//   /tokens      u16 or u32 [n_tokens]        /doc_offsets u64 [n_documents + 1]
//   /doc_source  u16 [n_documents]            /doc_hash    u64 [n_documents]
//   /loss_mask   u8 [n_tokens] (sft only): 1 at t means "token t is something the model must learn
//   to predict" /crc/NAME    u32 [ceil(bytes / crc_block_bytes)]: CRC32C of each block of the
//   array's bytes
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/status.h"

namespace sala::data {

inline constexpr int64_t kCrcBlockBytes = int64_t{4} << 20;
inline constexpr int kShardVersion = 1;

struct ShardHeader {
  std::string kind;  // "pretrain" or "sft"
  std::string tokenizer_fingerprint;
  int64_t vocab_size = 0;
  int64_t documents = 0;
  int64_t tokens = 0;
  int64_t shard_index = 0;
};

struct ShardContent {
  std::vector<int32_t> tokens;
  std::vector<uint64_t> doc_offsets = {0};
  std::vector<uint16_t> doc_source;
  std::vector<uint64_t> doc_hash;
  std::vector<uint8_t> loss_mask;  // empty unless sft
  int64_t documents() const { return static_cast<int64_t>(doc_source.size()); }
};

// Writes path.tmp, fsyncs it and renames it. header.documents and header.tokens are taken from the
// content.
Status WriteShard(const std::string& path, const ShardContent& content, ShardHeader header);

struct ShardArray {
  int64_t offset = 0;  // byte in the file
  int64_t count = 0;
  int64_t item_bytes = 0;
  int64_t bytes() const { return count * item_bytes; }
};

struct ShardLayout {
  ShardHeader header;
  std::map<std::string, ShardArray> arrays;  // "tokens", "crc/tokens", ...
};

// Checks attributes, types, shapes and contiguity: DS-FORMAT, DS-VERSION (65).
StatusOr<ShardLayout> ReadShardLayout(const std::string& path);

}  // namespace sala::data
