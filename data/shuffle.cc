#include "data/shuffle.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <tuple>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/rng.h"
#include "data/ingest.h"

namespace sala::data {
namespace {

using nlohmann::json;

struct Document {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;  // sft only
  uint64_t hash = 0;
  int64_t source = 0;
};

Status ReadDocument(TokenFile* file, int64_t d, bool sft, Document* out) {
  const auto length = static_cast<size_t>(file->length(d));
  out->tokens.resize(length);
  SALA_RETURN_IF_ERROR(file->CopyTokens(file->begin(d), file->length(d), out->tokens.data()));
  out->mask.resize(sft ? length : 0);
  if (sft) SALA_RETURN_IF_ERROR(file->CopyMask(file->begin(d), file->length(d), out->mask.data()));
  out->hash = file->hash(d);
  out->source = file->source(d);
  return OkStatus();
}

// What stands in front of a document in a bucket.
struct Entry {
  uint64_t draw = 0, content = 0, hash = 0, source = 0, tokens = 0, masked = 0;
  uint64_t bytes() const { return tokens * 4 + (masked != 0 ? tokens : 0); }
};

uint64_t ContentHash(std::string_view tokens_and_mask) { return Xxh3(tokens_and_mask); }

// Of the copies of a text each has a number, so that they do not come together.
uint64_t Draw(int64_t seed, uint64_t hash, uint64_t copy) {
  const auto low = [](uint64_t v) { return static_cast<uint32_t>(v); };
  const auto high = [](uint64_t v) { return static_cast<uint32_t>(v >> 32); };
  const auto key = static_cast<uint64_t>(seed);
  const auto words =
      Philox4x32({low(hash), high(hash), low(copy), high(copy)}, {low(key), high(key)});
  return static_cast<uint64_t>(words[0]) << 32 | words[1];
}

// Appends to many files through buffers that take `memory_bytes` together at most; no file stays
// open, so there may be thousands.
class Buckets {
 public:
  Buckets(std::string directory, size_t count, int64_t memory_bytes)
      : directory_(std::move(directory)),
        memory_bytes_(static_cast<size_t>(memory_bytes)),
        pending_(count) {}

  Status Add(const Entry& entry, std::string_view content) {
    std::string& to = pending_[BucketOf(entry.draw)];
    pending_bytes_ -= to.capacity();
    to.append(reinterpret_cast<const char*>(&entry), sizeof entry);
    to.append(content);
    pending_bytes_ += to.capacity();
    if (to.size() >= kFlushBytes) return Flush(BucketOf(entry.draw));
    return pending_bytes_ < memory_bytes_ ? OkStatus() : Finish();
  }
  Status Finish() {
    for (size_t b = 0; b < pending_.size(); ++b) SALA_RETURN_IF_ERROR(Flush(b));
    return OkStatus();
  }
  std::string Path(size_t bucket) const {
    return directory_ + "/" + std::to_string(bucket) + ".bucket";
  }
  size_t count() const { return pending_.size(); }

 private:
  static constexpr size_t kFlushBytes = size_t{256} << 10;

  // Rising with the draw, so buckets one after the other are in order.
  size_t BucketOf(uint64_t draw) const {
    return static_cast<size_t>((static_cast<unsigned __int128>(draw) * pending_.size()) >> 64);
  }
  Status Flush(size_t bucket) {
    std::string& bytes = pending_[bucket];
    if (bytes.empty()) return OkStatus();
    std::ofstream file(Path(bucket), std::ios::binary | std::ios::app);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (!file) return MakeError(ExitCode::kIo, "FILE-WRITE", Path(bucket) + ": cannot be written");
    pending_bytes_ -= bytes.capacity();
    bytes = std::string();
    pending_bytes_ += bytes.capacity();
    return OkStatus();
  }
  std::string directory_;
  size_t memory_bytes_, pending_bytes_ = 0;
  std::vector<std::string> pending_;
};

Status Scatter(TokenStore& store, int64_t seed, Buckets* buckets) {
  const bool sft = store.info().sft();
  Document document;
  std::string content;
  for (int64_t f = 0; f < store.files(); ++f) {
    SALA_ASSIGN_OR_RETURN(TokenFile * file, store.File(f));
    for (int64_t d = 0; d < file->documents(); ++d) {
      SALA_RETURN_IF_ERROR(ReadDocument(file, d, sft, &document));
      content.assign(reinterpret_cast<const char*>(document.tokens.data()),
                     document.tokens.size() * 4);
      content.append(reinterpret_cast<const char*>(document.mask.data()), document.mask.size());
      const Entry entry{.draw = Draw(seed, document.hash, 0),
                        .content = ContentHash(content),
                        .hash = document.hash,
                        .source = static_cast<uint64_t>(document.source),
                        .tokens = document.tokens.size(),
                        .masked = sft ? 1U : 0U};
      SALA_RETURN_IF_ERROR(buckets->Add(entry, content));
    }
  }
  return buckets->Finish();
}

struct Found {
  Entry entry;
  size_t at = 0;  // of the content in the bucket
};

Status BucketError(const std::string& path) {
  return MakeError(ExitCode::kData, "DS-CRC",
                   path + ": read otherwise than it was written; check the disk, shuffle again");
}

// The documents of a bucket in their order; none where no document fell into it.
struct Bucket {
  std::string bytes;
  std::vector<Found> found;
  std::string_view Content(const Found& f) const { return {bytes.data() + f.at, f.entry.bytes()}; }
};

StatusOr<Bucket> ReadBucket(const std::string& path) {
  Bucket bucket;
  if (!PathExists(path)) return bucket;
  SALA_ASSIGN_OR_RETURN(bucket.bytes, ReadFile(path));
  const std::string& bytes = bucket.bytes;
  for (size_t at = 0; at < bytes.size();) {
    Found next;
    if (bytes.size() - at < sizeof next.entry) return BucketError(path);
    std::memcpy(&next.entry, bytes.data() + at, sizeof next.entry);
    next.at = at + sizeof next.entry;
    const Entry& entry = next.entry;
    if (entry.tokens > bytes.size() || entry.bytes() > bytes.size() - next.at ||
        ContentHash(bucket.Content(next)) != entry.content)
      return BucketError(path);
    at = next.at + entry.bytes();
    bucket.found.push_back(next);
  }
  std::sort(bucket.found.begin(), bucket.found.end(), [](const Found& a, const Found& b) {
    return std::tie(a.entry.draw, a.entry.hash, a.entry.content, a.entry.source) <
           std::tie(b.entry.draw, b.entry.hash, b.entry.content, b.entry.source);
  });
  return bucket;
}

// Which number among the documents of its hash each has; they stand together in a bucket.
std::vector<uint64_t> CopyNumbers(const Bucket& bucket) {
  std::vector<uint64_t> numbers(bucket.found.size(), 0);
  for (size_t i = 1; i < numbers.size(); ++i) {
    if (bucket.found[i].entry.hash == bucket.found[i - 1].entry.hash)
      numbers[i] = numbers[i - 1] + 1;
  }
  return numbers;
}

// Gives all copies of a text but the first a draw of their own, and the bucket of it.
Status ScatterCopies(const Buckets& buckets, int64_t seed, Buckets* copies) {
  for (size_t b = 0; b < buckets.count(); ++b) {
    SALA_ASSIGN_OR_RETURN(const Bucket bucket, ReadBucket(buckets.Path(b)));
    const std::vector<uint64_t> numbers = CopyNumbers(bucket);
    for (size_t i = 0; i < numbers.size(); ++i) {
      if (numbers[i] == 0) continue;
      Entry entry = bucket.found[i].entry;
      entry.draw = Draw(seed, entry.hash, numbers[i]);
      SALA_RETURN_IF_ERROR(copies->Add(entry, bucket.Content(bucket.found[i])));
    }
  }
  return copies->Finish();
}

Status AddDocument(const Entry& entry, std::string_view content, TokenStoreWriter* writer) {
  Document document;
  document.tokens.resize(entry.tokens);
  if (entry.tokens > 0) std::memcpy(document.tokens.data(), content.data(), entry.tokens * 4);
  if (entry.masked != 0)
    document.mask.assign(content.begin() + static_cast<std::ptrdiff_t>(entry.tokens * 4),
                         content.end());
  return writer->Add({.tokens = document.tokens,
                      .loss_mask = document.mask,
                      .hash = entry.hash,
                      .source = static_cast<int64_t>(entry.source)});
}

// First documents of their text and copies with draws of this bucket, merged.
Status AddBucket(const std::string& path, const std::string& copies_path,
                 TokenStoreWriter* writer) {
  SALA_ASSIGN_OR_RETURN(const Bucket first, ReadBucket(path));
  SALA_ASSIGN_OR_RETURN(const Bucket copies, ReadBucket(copies_path));
  const std::vector<uint64_t> numbers = CopyNumbers(first);
  size_t next = 0;  // of the copies
  const auto add_copies = [&](uint64_t last) -> Status {
    for (; next < copies.found.size() && copies.found[next].entry.draw <= last; ++next) {
      SALA_RETURN_IF_ERROR(
          AddDocument(copies.found[next].entry, copies.Content(copies.found[next]), writer));
    }
    return OkStatus();
  };
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (numbers[i] > 0) continue;
    const Found& found = first.found[i];
    SALA_RETURN_IF_ERROR(add_copies(found.entry.draw));
    SALA_RETURN_IF_ERROR(AddDocument(found.entry, first.Content(found), writer));
  }
  return add_copies(std::numeric_limits<uint64_t>::max());
}

int64_t BytesOf(const DatasetInfo& info) {
  return info.tokens * (info.sft() ? 5 : 4) + info.documents * static_cast<int64_t>(sizeof(Entry));
}

}  // namespace

StatusOr<DatasetInfo> ShuffleDataset(const ShuffleOptions& options) {
  SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open(options.input));
  const DatasetInfo& info = store->info();
  const std::string name = options.name.empty() ? info.name : options.name;
  SALA_RETURN_IF_ERROR(CheckDatasetName("dataset", name));
  SALA_ASSIGN_OR_RETURN(
      auto writer,
      TokenStoreWriter::CreateLike(
          {.directory = options.output, .name = name, .shard_tokens = options.shard_tokens}, info));
  for (const DatasetSource& s : info.sources) writer->AddSource(s.name, s.license, s.note);
  const std::string directory = options.output + "/shuffle.buckets";
  SALA_RETURN_IF_ERROR(RemoveTree(directory));
  SALA_RETURN_IF_ERROR(MakeDirectories(directory + "/first"));
  SALA_RETURN_IF_ERROR(MakeDirectories(directory + "/copies"));
  const auto count = static_cast<size_t>(1 + BytesOf(info) / options.memory_bytes);
  Buckets buckets(directory + "/first", count, options.memory_bytes);
  Buckets copies(directory + "/copies", count, options.memory_bytes);
  const Status made = [&]() -> Status {
    SALA_RETURN_IF_ERROR(Scatter(*store, options.seed, &buckets));
    SALA_RETURN_IF_ERROR(ScatterCopies(buckets, options.seed, &copies));
    for (size_t b = 0; b < count; ++b) {
      SALA_RETURN_IF_ERROR(AddBucket(buckets.Path(b), copies.Path(b), writer.get()));
      SALA_RETURN_IF_ERROR(RemoveTree(buckets.Path(b)));
      SALA_RETURN_IF_ERROR(RemoveTree(copies.Path(b)));
    }
    return OkStatus();
  }();
  SALA_RETURN_IF_ERROR(RemoveTree(directory));
  SALA_RETURN_IF_ERROR(made);
  return writer->Finish({{"command", "shuffle"},
                         {"seed", options.seed},
                         {"dataset", info.fingerprint},
                         {"shuffled", true},
                         {"made", info.ingest}});
}

namespace {

Status CheckMergeable(const TokenStore& first, const TokenStore& other) {
  const DatasetInfo& a = first.info();
  const DatasetInfo& b = other.info();
  if (a.kind != b.kind) {
    return MakeError(ExitCode::kData, "DS-KIND",
                     b.directory + ": is of kind " + b.kind + ", " + a.directory + " of kind " +
                         a.kind + "; a store holds one kind");
  }
  if (a.tokenizer_fingerprint == b.tokenizer_fingerprint && a.vocab_size == b.vocab_size &&
      a.bos_id == b.bos_id && a.eos_id == b.eos_id && a.add_bos == b.add_bos &&
      a.add_eos == b.add_eos)
    return OkStatus();
  const auto end = [](const char* name, int32_t id, bool added) {
    const std::string token =
        id < 0 ? std::string("no ") + name : name + (" " + std::to_string(id));
    return ", " + token + (added || id < 0 ? "" : " (not in the documents)");
  };
  const auto words = [&](const DatasetInfo& info) {
    return info.tokenizer_name + " " + info.tokenizer_fingerprint.substr(0, 12) + " of " +
           std::to_string(info.vocab_size) + " tokens" + end("bos", info.bos_id, info.add_bos) +
           end("eos", info.eos_id, info.add_eos);
  };
  return MakeError(ExitCode::kData, "TOK-MISMATCH",
                   b.directory + ": made with " + words(b) + ", " + a.directory + " with " +
                       words(a) + "; ingest both in one way");
}

}  // namespace

StatusOr<DatasetInfo> MergeDatasets(const MergeOptions& options) {
  SALA_RETURN_IF_ERROR(CheckDatasetName("dataset", options.name));
  SALA_CHECK(!options.inputs.empty());
  std::vector<std::unique_ptr<TokenStore>> stores;
  for (const std::string& input : options.inputs) {
    SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open(input));
    if (!stores.empty()) SALA_RETURN_IF_ERROR(CheckMergeable(*stores[0], *store));
    stores.push_back(std::move(store));
  }
  const DatasetInfo& first = stores[0]->info();
  SALA_ASSIGN_OR_RETURN(
      auto writer,
      TokenStoreWriter::CreateLike(
          {.directory = options.output, .name = options.name, .shard_tokens = options.shard_tokens},
          first));
  std::vector<DatasetSource> sources;
  json from = json::array();
  for (const auto& store : stores) {
    std::vector<int64_t> place;  // of the store's sources among all
    for (const DatasetSource& s : store->info().sources) {
      const auto same = std::find_if(sources.begin(), sources.end(), [&](const DatasetSource& t) {
        return s.name == t.name && s.license == t.license && s.note == t.note;
      });
      place.push_back(same - sources.begin());
      if (same != sources.end()) continue;
      sources.push_back(s);
      writer->AddSource(s.name, s.license, s.note);
    }
    Document document;
    for (int64_t f = 0; f < store->files(); ++f) {
      SALA_ASSIGN_OR_RETURN(TokenFile * file, store->File(f));
      for (int64_t d = 0; d < file->documents(); ++d) {
        SALA_RETURN_IF_ERROR(ReadDocument(file, d, first.sft(), &document));
        SALA_RETURN_IF_ERROR(writer->Add({.tokens = document.tokens,
                                          .loss_mask = document.mask,
                                          .hash = document.hash,
                                          .source = place[static_cast<size_t>(document.source)]}));
      }
    }
    from.push_back({{"name", store->info().name},
                    {"dataset", store->info().fingerprint},
                    {"made", store->info().ingest}});
  }
  return writer->Finish({{"command", "merge"}, {"datasets", from}, {"shuffled", false}});
}

}  // namespace sala::data
