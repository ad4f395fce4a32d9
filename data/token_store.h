// Token store: a directory of dataset.json (written last: the commit record) and tokens-*.h5.
//
//   SALA_ASSIGN_OR_RETURN(auto writer, TokenStoreWriter::Create({.directory = "corpora/web", ...},
//   *tokenizer)); SALA_RETURN_IF_ERROR(writer->Add({.tokens = ids, .hash = Xxh3(text)}));
//   SALA_ASSIGN_OR_RETURN(DatasetInfo info, writer->Finish(ingest_json));
//
//   SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open("corpora/web"));
//   SALA_ASSIGN_OR_RETURN(TokenFile* file, store->File(0));
//   SALA_RETURN_IF_ERROR(file->CopyTokens(begin, count, out));   // verifies the CRC of a block on
//   its first touch
//
// Documents never span files. bos, if used, is the first token of a document, eos the last; both
// are part of it. Errors (65): DS-FORMAT, DS-VERSION, DS-CRC, DS-SIZE, DS-OFFSETS, DS-RANGE;
// DS-MISSING (66).
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/status.h"
#include "data/token_shard.h"
#include "data/tokenizer.h"

namespace sala::data {

struct DatasetFile {
  std::string name;
  int64_t bytes = 0, documents = 0, tokens = 0, max_document = 0;
  std::string sha256;
};

struct DatasetSource {
  std::string name, license, note;
  int64_t documents = 0, tokens = 0;
};

struct DatasetInfo {
  std::string directory, name;
  std::string kind;  // "pretrain" or "sft"
  std::string token_dtype;
  int64_t vocab_size = 0;
  int32_t bos_id = -1, eos_id = -1, pad_id = -1, unk_id = -1;  // -1: none
  std::string tokenizer_name, tokenizer_fingerprint;
  int64_t added_tokens = 0;
  bool add_bos = false, add_eos = false;
  int64_t documents = 0, tokens = 0, target_tokens = 0;
  std::array<int64_t, 40> length_histogram{};  // documents whose length is in [2^i, 2^(i+1))
  std::vector<DatasetFile> files;
  std::vector<DatasetSource> sources;
  nlohmann::json ingest;
  std::string fingerprint;  // SHA-256 of dataset.json
  bool sft() const { return kind == "sft"; }
};

// In place of the fingerprint in stores of foreign tokens that were imported without a tokenizer.
inline constexpr char kUnknownTokenizer[] = "unknown";

// dataset.json, checked.
StatusOr<DatasetInfo> ReadDatasetInfo(const std::string& directory);

struct TokenStoreOptions {
  std::string directory = {};
  std::string name = {};
  bool sft = false;
  bool add_bos = true;  // recorded; the caller puts the tokens there
  bool add_eos = true;
  int64_t shard_tokens = int64_t{256} << 20;
};

struct TokenDocument {
  std::span<const int32_t> tokens = {};
  std::span<const uint8_t> loss_mask = {};  // sft only, one per token
  uint64_t hash = 0;  // XXH3-64 of the text, or of the canonical JSON of a chat
  int64_t source = 0;
};

class TokenStoreWriter {
 public:
  // Refuses a directory that has a dataset.json (DS-EXISTS, 74).
  static StatusOr<std::unique_ptr<TokenStoreWriter>> Create(const TokenStoreOptions& options,
                                                            const Tokenizer& tokenizer);
  // For documents that are tokens already: vocabulary, tokenizer, bos, eos and kind are those of
  // `like`, not of the options.
  static StatusOr<std::unique_ptr<TokenStoreWriter>> CreateLike(const TokenStoreOptions& options,
                                                                const DatasetInfo& like);
  int64_t AddSource(const std::string& name, const std::string& license, const std::string& note);
  Status Add(const TokenDocument& document);
  int64_t documents() const { return info_.documents; }
  // Writes the last file and dataset.json. `ingest`: how the data was made.
  StatusOr<DatasetInfo> Finish(const nlohmann::json& ingest);

 private:
  TokenStoreWriter() = default;
  Status FlushShard();
  TokenStoreOptions options_;
  DatasetInfo info_;
  ShardContent shard_;
};

enum class Verify { kFirstTouch, kAlways, kNever };

// One mapped file. CopyTokens and CopyMask may be called from several threads.
class TokenFile {
 public:
  static StatusOr<std::unique_ptr<TokenFile>> Open(const DatasetInfo& info, int64_t index,
                                                   Verify verify);

  int64_t documents() const { return layout_.header.documents; }
  int64_t tokens() const { return layout_.header.tokens; }
  int64_t shard_index() const { return layout_.header.shard_index; }
  int64_t begin(int64_t document) const { return static_cast<int64_t>(offsets_[document]); }
  int64_t length(int64_t document) const { return begin(document + 1) - begin(document); }
  int64_t source(int64_t document) const { return sources_[document]; }
  uint64_t hash(int64_t document) const { return hashes_[document]; }

  // Tokens [begin, begin + count) of the file.
  Status CopyTokens(int64_t begin, int64_t count, int32_t* out);
  Status CopyMask(int64_t begin, int64_t count, uint8_t* out);  // sft only
  // Every block of every array.
  Status VerifyAll();

 private:
  struct Blocks {  // the verified blocks of one array
    ShardArray array;
    const uint32_t* crc = nullptr;
    std::string name;
    std::unique_ptr<std::atomic<bool>[]> done;
  };
  TokenFile() = default;
  Status Map(const std::string& name, Blocks* blocks);
  Status CheckOffsets() const;
  Status Touch(Blocks& blocks, int64_t begin, int64_t count);
  Status CheckBlock(const Blocks& blocks, int64_t block) const;
  // Bytes of an array that were read: documents are copied, so a run would otherwise hold all of a
  // store that it has seen as its own memory.
  void Forget(const Blocks& blocks, int64_t begin, int64_t bytes) const;
  Status CheckRange(int64_t first, int64_t last) const;
  template <typename T>
  const T* Array(const Blocks& blocks) const {
    return reinterpret_cast<const T*>(map_.data() + blocks.array.offset);
  }

  std::string path_;
  Verify verify_ = Verify::kFirstTouch;
  ShardLayout layout_;
  MappedFile map_;
  Blocks tokens_, mask_, offset_blocks_, source_blocks_, hash_blocks_;
  const uint64_t* offsets_ = nullptr;
  const uint16_t* sources_ = nullptr;
  const uint64_t* hashes_ = nullptr;
};

class TokenStore {
 public:
  static StatusOr<std::unique_ptr<TokenStore>> Open(const std::string& directory,
                                                    Verify verify = Verify::kFirstTouch);
  const DatasetInfo& info() const { return info_; }
  int64_t files() const { return static_cast<int64_t>(info_.files.size()); }
  // Opened and mapped on the first call; owned by the store.
  StatusOr<TokenFile*> File(int64_t index);
  // TOK-MISMATCH (65) unless the store was made with this tokenizer. A store whose tokenizer nobody
  // knows (kUnknownTokenizer) is taken as it is when the sizes of the vocabularies agree.
  Status CheckTokenizer(const Tokenizer& tokenizer) const;

  struct Place {
    int64_t file, document;
  };
  // Document number `n` of the whole dataset.
  StatusOr<Place> Locate(int64_t n) const;

 private:
  TokenStore() = default;
  DatasetInfo info_;
  Verify verify_ = Verify::kFirstTouch;
  std::mutex mutex_;
  std::vector<std::unique_ptr<TokenFile>> open_;
};

}  // namespace sala::data
