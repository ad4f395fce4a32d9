#include "data/shuffle.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
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

uint64_t Draw(int64_t seed, uint64_t hash) {
  const auto low = [](uint64_t v) { return static_cast<uint32_t>(v); };
  const auto high = [](uint64_t v) { return static_cast<uint32_t>(v >> 32); };
  const auto key = static_cast<uint64_t>(seed);
  const auto words = Philox4x32({low(hash), high(hash), 0, 0}, {low(key), high(key)});
  return static_cast<uint64_t>(words[0]) << 32 | words[1];
}

// Appends to many files through small buffers; none stays open, so there may be thousands.
class Buckets {
 public:
  Buckets(std::string directory, size_t count)
      : directory_(std::move(directory)), pending_(count) {}

  Status Add(const Entry& entry, std::string_view content) {
    std::string& to = pending_[BucketOf(entry.draw)];
    to.append(reinterpret_cast<const char*>(&entry), sizeof entry);
    to.append(content);
    return to.size() < kFlushBytes ? OkStatus() : Flush(BucketOf(entry.draw));
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
    std::ofstream file(Path(bucket), std::ios::binary | std::ios::app);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    if (!file) return MakeError(ExitCode::kIo, "FILE-WRITE", Path(bucket) + ": cannot be written");
    bytes.clear();
    return OkStatus();
  }
  std::string directory_;
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
      const Entry entry{.draw = Draw(seed, document.hash),
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

Status AddBucket(const std::string& path, TokenStoreWriter* writer) {
  SALA_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path));
  std::vector<Found> found;
  for (size_t at = 0; at < bytes.size();) {
    Found next;
    if (bytes.size() - at < sizeof next.entry) return BucketError(path);
    std::memcpy(&next.entry, bytes.data() + at, sizeof next.entry);
    next.at = at + sizeof next.entry;
    const Entry& entry = next.entry;
    if (entry.tokens > bytes.size() || entry.bytes() > bytes.size() - next.at ||
        ContentHash({bytes.data() + next.at, entry.bytes()}) != entry.content)
      return BucketError(path);
    at = next.at + entry.bytes();
    found.push_back(next);
  }
  std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) {
    return std::tie(a.entry.draw, a.entry.hash, a.entry.content, a.entry.source) <
           std::tie(b.entry.draw, b.entry.hash, b.entry.content, b.entry.source);
  });
  Document document;
  for (const Found& f : found) {
    const char* content = bytes.data() + f.at;
    document.tokens.resize(f.entry.tokens);
    if (f.entry.tokens > 0) std::memcpy(document.tokens.data(), content, f.entry.tokens * 4);
    document.mask.clear();
    if (f.entry.masked != 0)
      document.mask.assign(content + f.entry.tokens * 4, content + f.entry.bytes());
    SALA_RETURN_IF_ERROR(writer->Add({.tokens = document.tokens,
                                      .loss_mask = document.mask,
                                      .hash = f.entry.hash,
                                      .source = static_cast<int64_t>(f.entry.source)}));
  }
  return OkStatus();
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
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  Buckets buckets(directory, static_cast<size_t>(1 + BytesOf(info) / options.memory_bytes));
  const Status made = [&]() -> Status {
    SALA_RETURN_IF_ERROR(Scatter(*store, options.seed, &buckets));
    for (size_t b = 0; b < buckets.count(); ++b) {
      SALA_RETURN_IF_ERROR(AddBucket(buckets.Path(b), writer.get()));
      SALA_RETURN_IF_ERROR(RemoveTree(buckets.Path(b)));
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
