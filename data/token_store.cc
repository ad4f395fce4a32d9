#include "data/token_store.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"

namespace sala::data {
namespace {

Status DataError(const char* code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

constexpr char kRestore[] = "; restore the file or ingest again";

}  // namespace

Status TokenFile::Map(const std::string& name, Blocks* blocks) {
  const auto find = [&](const std::string& key) { return layout_.arrays.find(key); };
  const auto array = find(name);
  const auto crc = find("crc/" + name);
  if (array == layout_.arrays.end() || crc == layout_.arrays.end())
    return DataError("DS-FORMAT", path_ + ": no dataset /" + name + " or /crc/" + name + kRestore);
  for (const auto& a : {array->second, crc->second}) {
    if (a.offset < 0 || a.bytes() > static_cast<int64_t>(map_.size()) ||
        a.offset > static_cast<int64_t>(map_.size()) - a.bytes())
      return DataError("DS-FORMAT", path_ + ": /" + name + " lies outside the file" + kRestore);
    if (a.bytes() > 0 && a.offset % a.item_bytes != 0)
      return DataError("DS-FORMAT",
                       path_ + ": /" + name + " is not aligned in the file" + kRestore);
  }
  const int64_t n_blocks = (array->second.bytes() + kCrcBlockBytes - 1) / kCrcBlockBytes;
  if (crc->second.count != n_blocks || crc->second.item_bytes != 4) {
    return DataError("DS-FORMAT", path_ + ": /crc/" + name + " has " +
                                      std::to_string(crc->second.count) + " values, expected " +
                                      std::to_string(n_blocks) + kRestore);
  }
  blocks->array = array->second;
  blocks->name = name;
  blocks->crc = reinterpret_cast<const uint32_t*>(map_.data() + crc->second.offset);
  blocks->done = std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(n_blocks));
  return OkStatus();
}

Status TokenFile::CheckBlock(const Blocks& blocks, int64_t block) const {
  const int64_t begin = block * kCrcBlockBytes;
  const int64_t bytes = std::min(kCrcBlockBytes, blocks.array.bytes() - begin);
  const char* data = map_.data() + blocks.array.offset + begin;
  const uint32_t found = Crc32c(data, static_cast<size_t>(bytes));
  if (found != blocks.crc[block]) {
    return DataError("DS-CRC", path_ + ": /" + blocks.name + " block " + std::to_string(block) +
                                   " (byte " + std::to_string(blocks.array.offset + begin) +
                                   " of the file): CRC32C " + Hex32(found) + ", expected " +
                                   Hex32(blocks.crc[block]) + "; restore the file or ingest again");
  }
  if (&blocks == &tokens_) {
    const int64_t item = blocks.array.item_bytes;
    return CheckRange(begin / item, (begin + bytes) / item);
  }
  return OkStatus();
}

Status TokenFile::CheckRange(int64_t first, int64_t last) const {
  const auto at = [&](int64_t i) -> int64_t {
    return tokens_.array.item_bytes == 2 ? Array<uint16_t>(tokens_)[i]
                                         : Array<uint32_t>(tokens_)[i];
  };
  for (int64_t i = first; i < last; ++i) {
    if (at(i) >= layout_.header.vocab_size) {
      return DataError("DS-RANGE", path_ + ": token " + std::to_string(i) + " has id " +
                                       std::to_string(at(i)) + ", expected below vocab_size " +
                                       std::to_string(layout_.header.vocab_size) +
                                       "; ingest again with the right tokenizer");
    }
  }
  return OkStatus();
}

Status TokenFile::Touch(Blocks& blocks, int64_t begin, int64_t count) {
  if (verify_ == Verify::kNever || count == 0) return OkStatus();
  const int64_t item = blocks.array.item_bytes;
  for (int64_t b = begin * item / kCrcBlockBytes;
       b <= ((begin + count) * item - 1) / kCrcBlockBytes; ++b) {
    std::atomic<bool>& done = blocks.done[static_cast<size_t>(b)];
    if (verify_ == Verify::kFirstTouch && done.load(std::memory_order_relaxed)) continue;
    SALA_RETURN_IF_ERROR(CheckBlock(blocks, b));
    Forget(blocks, b * kCrcBlockBytes, kCrcBlockBytes);
    done.store(true, std::memory_order_relaxed);
  }
  return OkStatus();
}

void TokenFile::Forget(const Blocks& blocks, int64_t begin, int64_t bytes) const {
  map_.Forget(static_cast<size_t>(blocks.array.offset + begin),
              static_cast<size_t>(std::min(bytes, blocks.array.bytes() - begin)));
}

Status TokenFile::CheckOffsets() const {
  const int64_t documents = layout_.header.documents;
  const auto bad = [&](const std::string& text) {
    return DataError("DS-OFFSETS", path_ + ": /doc_offsets " + text + kRestore);
  };
  if (offsets_[0] != 0) return bad("starts with " + std::to_string(offsets_[0]) + ", expected 0");
  for (int64_t d = 0; d < documents; ++d) {
    if (offsets_[d + 1] <= offsets_[d])
      return bad("does not rise at document " + std::to_string(d));
  }
  if (offsets_[documents] != static_cast<uint64_t>(layout_.header.tokens)) {
    return bad("ends with " + std::to_string(offsets_[documents]) + ", expected n_tokens " +
               std::to_string(layout_.header.tokens));
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<TokenFile>> TokenFile::Open(const DatasetInfo& info, int64_t index,
                                                     Verify verify) {
  const DatasetFile& entry = info.files[static_cast<size_t>(index)];
  std::unique_ptr<TokenFile> file(new TokenFile());
  file->path_ = info.directory + "/" + entry.name;
  file->verify_ = verify;
  SALA_ASSIGN_OR_RETURN(const int64_t size, FileSize(file->path_));
  if (size != entry.bytes) {
    return DataError("DS-SIZE", file->path_ + ": file has " + std::to_string(size) +
                                    " bytes, dataset.json says " + std::to_string(entry.bytes) +
                                    "; restore the file or ingest again");
  }
  SALA_ASSIGN_OR_RETURN(file->layout_, ReadShardLayout(file->path_));
  const ShardHeader& header = file->layout_.header;
  const auto same = [&](const char* what, const auto& found, const auto& expected) {
    if (found == expected) return OkStatus();
    const nlohmann::json f = found;
    const nlohmann::json e = expected;
    return DataError("DS-FORMAT", file->path_ + ": " + what + " is " + Printable(f.dump()) +
                                      ", dataset.json says " + Printable(e.dump()) + kRestore);
  };
  SALA_RETURN_IF_ERROR(same("kind", header.kind, info.kind));
  SALA_RETURN_IF_ERROR(same("vocab_size", header.vocab_size, info.vocab_size));
  SALA_RETURN_IF_ERROR(
      same("tokenizer_fingerprint", header.tokenizer_fingerprint, info.tokenizer_fingerprint));
  SALA_RETURN_IF_ERROR(same("n_documents", header.documents, entry.documents));
  SALA_RETURN_IF_ERROR(same("n_tokens", header.tokens, entry.tokens));
  SALA_ASSIGN_OR_RETURN(file->map_, MappedFile::Open(file->path_));
  SALA_RETURN_IF_ERROR(file->Map("tokens", &file->tokens_));
  SALA_RETURN_IF_ERROR(file->Map("doc_offsets", &file->offset_blocks_));
  SALA_RETURN_IF_ERROR(file->Map("doc_source", &file->source_blocks_));
  SALA_RETURN_IF_ERROR(file->Map("doc_hash", &file->hash_blocks_));
  if (info.sft()) SALA_RETURN_IF_ERROR(file->Map("loss_mask", &file->mask_));
  for (Blocks* small : {&file->offset_blocks_, &file->source_blocks_, &file->hash_blocks_})
    SALA_RETURN_IF_ERROR(file->Touch(*small, 0, small->array.count));
  file->offsets_ = file->Array<uint64_t>(file->offset_blocks_);
  file->sources_ = file->Array<uint16_t>(file->source_blocks_);
  file->hashes_ = file->Array<uint64_t>(file->hash_blocks_);
  SALA_RETURN_IF_ERROR(file->CheckOffsets());
  return file;
}

Status TokenFile::CopyTokens(int64_t begin, int64_t count, int32_t* out) {
  SALA_CHECK(begin >= 0 && count >= 0 && begin + count <= tokens())
      << path_ << " [" << begin << ", +" << count << ")";
  SALA_RETURN_IF_ERROR(Touch(tokens_, begin, count));
  if (tokens_.array.item_bytes == 2) {
    std::copy_n(Array<uint16_t>(tokens_) + begin, count, out);
  } else if (count > 0) {
    std::memcpy(out, Array<uint32_t>(tokens_) + begin, static_cast<size_t>(count) * 4);
  }
  Forget(tokens_, begin * tokens_.array.item_bytes, count * tokens_.array.item_bytes);
  return OkStatus();
}

Status TokenFile::CopyMask(int64_t begin, int64_t count, uint8_t* out) {
  SALA_CHECK(mask_.crc != nullptr && begin >= 0 && count >= 0 && begin + count <= tokens())
      << path_;
  SALA_RETURN_IF_ERROR(Touch(mask_, begin, count));
  if (count > 0) std::memcpy(out, Array<uint8_t>(mask_) + begin, static_cast<size_t>(count));
  Forget(mask_, begin, count);
  return OkStatus();
}

Status TokenFile::VerifyAll() {
  for (Blocks* blocks : {&tokens_, &mask_, &offset_blocks_, &source_blocks_, &hash_blocks_}) {
    if (blocks->crc == nullptr) continue;
    for (int64_t b = 0; b * kCrcBlockBytes < blocks->array.bytes(); ++b)
      SALA_RETURN_IF_ERROR(CheckBlock(*blocks, b));
  }
  return CheckOffsets();
}

StatusOr<std::unique_ptr<TokenStore>> TokenStore::Open(const std::string& directory,
                                                       Verify verify) {
  std::unique_ptr<TokenStore> store(new TokenStore());
  SALA_ASSIGN_OR_RETURN(store->info_, ReadDatasetInfo(directory));
  store->verify_ = verify;
  store->open_.resize(store->info_.files.size());
  return store;
}

StatusOr<TokenFile*> TokenStore::File(int64_t index) {
  SALA_CHECK(index >= 0 && index < files()) << "file " << index;
  const std::lock_guard<std::mutex> lock(mutex_);
  auto& slot = open_[static_cast<size_t>(index)];
  if (slot == nullptr) {
    SALA_ASSIGN_OR_RETURN(slot, TokenFile::Open(info_, index, verify_));
  }
  return slot.get();
}

Status TokenStore::CheckTokenizer(const Tokenizer& tokenizer) const {
  if (tokenizer.fingerprint() == info_.tokenizer_fingerprint) return OkStatus();
  if (info_.tokenizer_fingerprint == kUnknownTokenizer &&
      tokenizer.vocab_size() == info_.vocab_size)
    return OkStatus();
  return DataError("TOK-MISMATCH",
                   info_.directory + ": made with tokenizer " + Printable(info_.tokenizer_name) +
                       " " + info_.tokenizer_fingerprint.substr(0, 12) + " (" +
                       std::to_string(info_.vocab_size) + " tokens), the run uses " +
                       tokenizer.name() + " " + tokenizer.fingerprint().substr(0, 12) + " (" +
                       std::to_string(tokenizer.vocab_size()) +
                       " tokens); ingest the data with the run's tokenizer");
}

StatusOr<TokenStore::Place> TokenStore::Locate(int64_t n) const {
  int64_t left = n;
  for (size_t f = 0; left >= 0 && f < info_.files.size(); ++f) {
    if (left < info_.files[f].documents) return Place{static_cast<int64_t>(f), left};
    left -= info_.files[f].documents;
  }
  return MakeError(ExitCode::kUsage, "DS-DOCUMENT",
                   info_.directory + ": no document " + std::to_string(n) +
                       "; the dataset has documents 0 to " + std::to_string(info_.documents - 1));
}

}  // namespace sala::data
