#include "data/megatron.h"

#include <cstring>
#include <nlohmann/json.hpp>
#include <span>
#include <string_view>
#include <vector>

#include "core/file.h"
#include "core/hash.h"
#include "data/ingest.h"

namespace sala::data {
namespace {

constexpr std::string_view kMagic("MMIDIDX\0\0", 9);
constexpr int64_t kHeaderBytes = 9 + 8 + 1 + 8 + 8;
constexpr int64_t kLongestDocument = (int64_t{1} << 32) - 2;

Status Bad(const std::string& path, const std::string& text) {
  return MakeError(ExitCode::kData, "ING-FOREIGN", path + ": " + text);
}

template <typename T>
T LoadAt(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Bytes of a token; 0 for a code that is no integer type.
int64_t TokenBytes(int code) {
  switch (code) {
    case 1:
    case 2:
      return 1;
    case 3:
    case 8:
      return 2;
    case 4:
      return 4;
    case 5:
      return 8;
    default:
      return 0;
  }
}

int64_t LoadToken(int code, const char* at) {
  switch (code) {
    case 1:
      return LoadAt<uint8_t>(at);
    case 2:
      return LoadAt<int8_t>(at);
    case 3:
      return LoadAt<int16_t>(at);
    case 4:
      return LoadAt<int32_t>(at);
    case 5:
      return LoadAt<int64_t>(at);
    default:
      return LoadAt<uint16_t>(at);
  }
}

class Index {
 public:
  static StatusOr<Index> Open(const std::string& prefix) {
    Index index;
    index.path_ = prefix + ".idx";
    SALA_ASSIGN_OR_RETURN(index.map_, MappedFile::Open(index.path_));
    SALA_RETURN_IF_ERROR(index.ReadHeader());
    SALA_RETURN_IF_ERROR(index.CheckDocuments());
    return index;
  }
  int code() const { return code_; }
  int64_t sequences() const { return sequences_; }
  int64_t documents() const { return entries_ - 1; }
  int64_t length(int64_t s) const { return LoadAt<int32_t>(lengths_ + 4 * s); }
  int64_t pointer(int64_t s) const { return LoadAt<int64_t>(pointers_ + 8 * s); }
  // First sequence of document d, and of the one behind it.
  int64_t first(int64_t d) const { return LoadAt<int64_t>(documents_ + 8 * d); }

  Status CheckSequences(const std::string& bin, int64_t bin_bytes) const {
    const int64_t item = TokenBytes(code_);
    int64_t all_bytes = 0;
    for (int64_t s = 0; s < sequences_; ++s) {
      const std::string where = "sequence " + std::to_string(s);
      if (length(s) < 0) return Bad(path_, where + " has length " + std::to_string(length(s)));
      const int64_t bytes = length(s) * item;  // at most 2^34
      if (pointer(s) < 0 || bytes > bin_bytes || pointer(s) > bin_bytes - bytes) {
        return Bad(path_, where + " lies at byte " + std::to_string(pointer(s)) + " with " +
                              std::to_string(bytes) + " bytes, outside " + bin + " of " +
                              std::to_string(bin_bytes) + " bytes; copy both files again");
      }
      // Else a small file could stand for any number of tokens.
      all_bytes += bytes;
      if (all_bytes > bin_bytes) {
        return Bad(path_, "the sequences up to " + std::to_string(s) + " have " +
                              std::to_string(all_bytes) + " bytes, " + bin + " has " +
                              std::to_string(bin_bytes) +
                              "; sequences that overlap are not read, copy both files again");
      }
      if (modes_ != nullptr && modes_[s] != 0) {
        return MakeError(ExitCode::kData, "ING-MODALITY",
                         path_ + ": " + where + " has mode " + std::to_string(modes_[s]) +
                             ", expected 0 (text)");
      }
    }
    return OkStatus();
  }

 private:
  Status ReadHeader() {
    const auto size = static_cast<int64_t>(map_.size());
    if (size < kHeaderBytes || std::string_view(map_.data(), kMagic.size()) != kMagic)
      return Bad(path_,
                 "no Megatron index (it begins with MMIDIDX); give the prefix of an .idx "
                 "and a .bin file");
    const auto version = LoadAt<uint64_t>(map_.data() + 9);
    if (version != 1)
      return Bad(path_, "version " + std::to_string(version) + ", this program reads 1");
    code_ = LoadAt<uint8_t>(map_.data() + 17);
    if (TokenBytes(code_) == 0) {
      return Bad(path_, "type code " + std::to_string(code_) +
                            (code_ == 6 || code_ == 7 ? " (floating point)" : "") +
                            ", expected an integer type: 1, 2, 3, 4, 5 or 8");
    }
    const auto sequences = LoadAt<uint64_t>(map_.data() + 18);
    const auto entries = LoadAt<uint64_t>(map_.data() + 26);
    // Below this no product overflows.
    constexpr uint64_t kMost = uint64_t{1} << 48;
    if (sequences == 0 || sequences > kMost || entries < 2 || entries > kMost) {
      return Bad(path_, std::to_string(sequences) + " sequences and " + std::to_string(entries) +
                            " entries of the document index cannot be");
    }
    sequences_ = static_cast<int64_t>(sequences);
    entries_ = static_cast<int64_t>(entries);
    const int64_t plain = kHeaderBytes + 12 * sequences_ + 8 * entries_;
    if (size != plain && size != plain + sequences_) {
      return Bad(path_, "file has " + std::to_string(size) + " bytes, " +
                            std::to_string(sequences_) + " sequences and " +
                            std::to_string(entries_) + " entries need " + std::to_string(plain) +
                            " (" + std::to_string(plain + sequences_) +
                            " with modes); copy it again");
    }
    lengths_ = map_.data() + kHeaderBytes;
    pointers_ = lengths_ + 4 * sequences_;
    documents_ = pointers_ + 8 * sequences_;
    if (size > plain) modes_ = reinterpret_cast<const int8_t*>(documents_ + 8 * entries_);
    return OkStatus();
  }

  Status CheckDocuments() const {
    if (first(0) != 0)
      return Bad(path_,
                 "the document index starts with " + std::to_string(first(0)) + ", expected 0");
    for (int64_t d = 0; d + 1 < entries_; ++d) {
      if (first(d + 1) < first(d))
        return Bad(path_, "the document index falls behind document " + std::to_string(d));
    }
    if (first(entries_ - 1) != sequences_) {
      return Bad(path_, "the document index ends with " + std::to_string(first(entries_ - 1)) +
                            ", expected the " + std::to_string(sequences_) + " sequences");
    }
    return OkStatus();
  }

  std::string path_;
  MappedFile map_;
  int code_ = 0;
  int64_t sequences_ = 0, entries_ = 0;
  const char* lengths_ = nullptr;
  const char* pointers_ = nullptr;
  const char* documents_ = nullptr;
  const int8_t* modes_ = nullptr;
};

DatasetInfo InfoOf(const MegatronOptions& options, const Tokenizer* tokenizer) {
  DatasetInfo info;
  info.kind = "pretrain";
  info.vocab_size = options.vocab_size;
  info.tokenizer_name = kUnknownTokenizer;
  info.tokenizer_fingerprint = kUnknownTokenizer;
  if (tokenizer == nullptr) return info;
  info.vocab_size = tokenizer->vocab_size();
  info.bos_id = tokenizer->bos_id();
  info.eos_id = tokenizer->eos_id();
  info.pad_id = tokenizer->pad_id();
  info.unk_id = tokenizer->unk_id();
  info.tokenizer_name = tokenizer->name();
  info.tokenizer_fingerprint = tokenizer->fingerprint();
  info.added_tokens = static_cast<int64_t>(tokenizer->added_tokens().size());
  info.add_bos = info.bos_id >= 0;
  info.add_eos = info.eos_id >= 0;
  return info;
}

class Import {
 public:
  Import(const MegatronOptions& options, const Tokenizer* tokenizer)
      : tokenizer_(tokenizer),
        info_(InfoOf(options, tokenizer)),
        bin_path_(options.prefix + ".bin") {}

  Status Open(const std::string& prefix) {
    SALA_ASSIGN_OR_RETURN(index_, Index::Open(prefix));
    SALA_ASSIGN_OR_RETURN(bin_, MappedFile::Open(bin_path_));
    return index_.CheckSequences(bin_path_, static_cast<int64_t>(bin_.size()));
  }

  // First pass: every id, and whether bos and eos are everywhere; nothing is written for files
  // that are refused.
  Status Look() {
    bool any = false;
    for (int64_t d = 0; d < index_.documents(); ++d) {
      SALA_RETURN_IF_ERROR(Load(d));
      if (tokens_.empty()) continue;
      any = true;
      info_.add_bos = info_.add_bos && tokens_.front() == info_.bos_id;
      info_.add_eos = info_.add_eos && tokens_.back() == info_.eos_id;
    }
    return any ? OkStatus() : Bad(bin_path_, "no document has a token");
  }

  Status Write(TokenStoreWriter* writer) {
    for (int64_t d = 0; d < index_.documents(); ++d) {
      SALA_RETURN_IF_ERROR(Load(d));
      if (tokens_.empty()) {
        ++empty_;
        continue;
      }
      SALA_RETURN_IF_ERROR(writer->Add({.tokens = tokens_, .hash = Hash()}));
    }
    return OkStatus();
  }
  const DatasetInfo& info() const { return info_; }
  int64_t empty() const { return empty_; }

 private:
  Status Load(int64_t d) {
    const int64_t item = TokenBytes(index_.code());
    tokens_.clear();
    for (int64_t s = index_.first(d); s < index_.first(d + 1); ++s) {
      const char* at = bin_.data() + index_.pointer(s);
      if (static_cast<int64_t>(tokens_.size()) + index_.length(s) > kLongestDocument)
        return Bad(bin_path_, "document " + std::to_string(d) + " has more than 2^32 - 2 tokens");
      for (int64_t i = 0; i < index_.length(s); ++i, at += item) {
        const int64_t id = LoadToken(index_.code(), at);
        if (id < 0 || id >= info_.vocab_size) {
          return MakeError(ExitCode::kData, "DS-RANGE",
                           bin_path_ + ": document " + std::to_string(d) + ", sequence " +
                               std::to_string(s) + ", token " + std::to_string(i) + " (byte " +
                               std::to_string(at - bin_.data()) + ") has id " + std::to_string(id) +
                               ", expected 0 to " + std::to_string(info_.vocab_size - 1) +
                               "; name the tokenizer that the data was made with");
        }
        tokens_.push_back(static_cast<int32_t>(id));
      }
    }
    return OkStatus();
  }

  uint64_t Hash() const {
    if (tokenizer_ == nullptr)
      return Xxh3({reinterpret_cast<const char*>(tokens_.data()), tokens_.size() * 4});
    std::span<const int32_t> ids = tokens_;
    if (info_.add_bos) ids = ids.subspan(1);
    if (info_.add_eos && !ids.empty()) ids = ids.first(ids.size() - 1);
    return Xxh3(tokenizer_->Decode(ids));
  }

  const Tokenizer* tokenizer_;
  DatasetInfo info_;
  std::string bin_path_;
  Index index_;
  MappedFile bin_;
  std::vector<int32_t> tokens_;
  int64_t empty_ = 0;
};

}  // namespace

StatusOr<DatasetInfo> ImportMegatron(const MegatronOptions& options, const Tokenizer* tokenizer) {
  SALA_RETURN_IF_ERROR(CheckDatasetName("dataset", options.name));
  Import import(options, tokenizer);
  SALA_RETURN_IF_ERROR(import.Open(options.prefix));
  SALA_RETURN_IF_ERROR(import.Look());
  SALA_ASSIGN_OR_RETURN(
      auto writer,
      TokenStoreWriter::CreateLike(
          {.directory = options.output, .name = options.name, .shard_tokens = options.shard_tokens},
          import.info()));
  writer->AddSource(options.name, options.license, options.note);
  SALA_RETURN_IF_ERROR(import.Write(writer.get()));
  return writer->Finish({{"command", "import-megatron"},
                         {"prefix", options.prefix},
                         {"empty_documents", import.empty()},
                         {"shuffled", false}});
}

}  // namespace sala::data
