// dataset.json and the writer of a token store.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <set>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"
#include "data/token_store.h"

namespace sala::data {
namespace {

using nlohmann::json;

constexpr char kNoCrc[] = "00000000";

Status FormatError(const std::string& path, const std::string& text) {
  return MakeError(ExitCode::kData, "DS-FORMAT",
                   path + ": " + text + "; restore the file or ingest again");
}

json IdOrNull(int32_t id) { return id < 0 ? json() : json(id); }

StatusOr<std::string> Sha256OfFile(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  Sha256 sha;
  sha.Update(file.data(), file.size());
  return sha.HexDigest();
}

json ToJson(const DatasetInfo& info) {
  json files = json::array();
  for (const DatasetFile& f : info.files) {
    files.push_back({{"name", f.name},
                     {"bytes", f.bytes},
                     {"documents", f.documents},
                     {"tokens", f.tokens},
                     {"sha256", f.sha256},
                     {"max_document", f.max_document}});
  }
  json sources = json::array();
  for (const DatasetSource& s : info.sources) {
    sources.push_back({{"name", s.name},
                       {"license", s.license},
                       {"note", s.note},
                       {"documents", s.documents},
                       {"tokens", s.tokens}});
  }
  return {{"format", "token-dataset"},
          {"version", kShardVersion},
          {"name", info.name},
          {"kind", info.kind},
          {"token_dtype", info.token_dtype},
          {"vocab_size", info.vocab_size},
          {"bos_id", IdOrNull(info.bos_id)},
          {"eos_id", IdOrNull(info.eos_id)},
          {"pad_id", IdOrNull(info.pad_id)},
          {"unk_id", IdOrNull(info.unk_id)},
          {"tokenizer",
           {{"name", info.tokenizer_name},
            {"fingerprint", info.tokenizer_fingerprint},
            {"added_tokens", info.added_tokens},
            {"add_bos", info.add_bos},
            {"add_eos", info.add_eos}}},
          {"documents", info.documents},
          {"tokens", info.tokens},
          {"target_tokens", info.target_tokens},
          {"length_histogram", info.length_histogram},
          {"files", files},
          {"sources", sources},
          {"ingest", info.ingest},
          {"self_crc32c", kNoCrc}};
}

// The text with its own CRC32C put in place of the eight zeros, as the format asks.
std::string WithSelfCrc(std::string text) {
  const std::string key = std::string("\"self_crc32c\": \"");
  const size_t at = text.rfind(key);
  SALA_CHECK(at != std::string::npos) << "dataset.json without its CRC";
  text.replace(at + key.size(), 8, Hex32(Crc32c(text.data(), text.size())));
  return text;
}

Status CheckSelfCrc(const std::string& path, std::string text, const std::string& found) {
  const std::string quoted = "\"" + found + "\"";
  const size_t key = text.rfind("\"self_crc32c\"");
  const size_t at = key == std::string::npos ? key : text.find(quoted, key);
  if (found.size() != 8 || at == std::string::npos)
    return FormatError(path, "self_crc32c is not 8 hex digits");
  text.replace(at + 1, 8, kNoCrc);
  const std::string expected = Hex32(Crc32c(text.data(), text.size()));
  if (expected == found) return OkStatus();
  return MakeError(ExitCode::kData, "DS-CRC",
                   path + ": CRC32C of the file is " + expected + ", its self_crc32c says " +
                       found + "; the file was changed after it was written, restore it");
}

// Reads the fields; throws nlohmann's exceptions where a field is missing or of another type.
DatasetInfo FromJson(const json& j) {
  DatasetInfo info;
  const auto id = [&](const char* key) {
    return j.at(key).is_null() ? -1 : j.at(key).get<int32_t>();
  };
  info.name = j.at("name");
  info.kind = j.at("kind");
  info.token_dtype = j.at("token_dtype");
  info.vocab_size = j.at("vocab_size");
  info.bos_id = id("bos_id");
  info.eos_id = id("eos_id");
  info.pad_id = id("pad_id");
  info.unk_id = id("unk_id");
  const json& tokenizer = j.at("tokenizer");
  info.tokenizer_name = tokenizer.at("name");
  info.tokenizer_fingerprint = tokenizer.at("fingerprint");
  info.added_tokens = tokenizer.at("added_tokens");
  info.add_bos = tokenizer.at("add_bos");
  info.add_eos = tokenizer.at("add_eos");
  info.documents = j.at("documents");
  info.tokens = j.at("tokens");
  info.target_tokens = j.at("target_tokens");
  info.length_histogram = j.at("length_histogram").get<std::array<int64_t, 40>>();
  for (const json& f : j.at("files")) {
    info.files.push_back({.name = f.at("name"),
                          .bytes = f.at("bytes"),
                          .documents = f.at("documents"),
                          .tokens = f.at("tokens"),
                          .max_document = f.at("max_document"),
                          .sha256 = f.at("sha256")});
  }
  for (const json& s : j.at("sources")) {
    info.sources.push_back({.name = s.at("name"),
                            .license = s.at("license"),
                            .note = s.at("note"),
                            .documents = s.at("documents"),
                            .tokens = s.at("tokens")});
  }
  info.ingest = j.at("ingest");
  return info;
}

Status CheckInfo(const std::string& path, const DatasetInfo& info) {
  if (info.kind != "pretrain" && info.kind != "sft")
    return FormatError(path, "kind is \"" + Printable(info.kind) + "\", expected pretrain or sft");
  if (info.token_dtype != "u16" && info.token_dtype != "u32")
    return FormatError(
        path, "token_dtype is \"" + Printable(info.token_dtype) + "\", expected u16 or u32");
  if (info.vocab_size <= 0 || info.vocab_size > (int64_t{1} << 31))
    return FormatError(path, "vocab_size is " + std::to_string(info.vocab_size));
  int64_t documents = 0;
  int64_t tokens = 0;
  for (const DatasetFile& f : info.files) {
    if (f.name.empty() || f.name.find('/') != std::string::npos || f.name[0] == '.')
      return FormatError(path, "file name \"" + Printable(f.name) + "\" is not a plain name");
    constexpr int64_t kMost = int64_t{1} << 50;
    if (f.documents < 1 || f.tokens < f.documents || f.tokens > kMost || f.bytes < 0)
      return FormatError(path, f.name + ": " + std::to_string(f.documents) + " documents and " +
                                   std::to_string(f.tokens) + " tokens cannot be");
    documents += f.documents;
    tokens += f.tokens;
  }
  if (documents != info.documents || tokens != info.tokens) {
    return FormatError(path, "the files have " + std::to_string(documents) + " documents and " +
                                 std::to_string(tokens) + " tokens, the totals say " +
                                 std::to_string(info.documents) + " and " +
                                 std::to_string(info.tokens));
  }
  return OkStatus();
}

}  // namespace

StatusOr<DatasetInfo> ReadDatasetInfo(const std::string& directory) {
  const std::string path = directory + "/dataset.json";
  if (!PathExists(path)) {
    return MakeError(ExitCode::kNoInput, "DS-MISSING",
                     path + ": no such file, so " + directory +
                         " is not a complete dataset; run `sala data ingest`");
  }
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const json j = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!j.is_object()) return FormatError(path, "not a JSON object");
  if (!j.contains("format") || j["format"] != "token-dataset")
    return FormatError(path, "\"format\" is not \"token-dataset\"");
  if (!j.contains("version") || j["version"] != kShardVersion) {
    return MakeError(
        ExitCode::kData, "DS-VERSION",
        path + ": version " + (j.contains("version") ? Printable(j["version"].dump()) : "missing") +
            ", this program reads " + std::to_string(kShardVersion) + "; use a newer program");
  }
  const std::string crc = j.contains("self_crc32c") && j["self_crc32c"].is_string()
                              ? j["self_crc32c"].get<std::string>()
                              : "";
  SALA_RETURN_IF_ERROR(CheckSelfCrc(path, text, crc));
  DatasetInfo info;
  try {
    info = FromJson(j);
  } catch (const json::exception& error) {
    return FormatError(path, Printable(error.what()));
  }
  info.directory = directory;
  info.fingerprint = Sha256Hex(text);
  SALA_RETURN_IF_ERROR(CheckInfo(path, info));
  return info;
}

StatusOr<std::unique_ptr<TokenStoreWriter>> TokenStoreWriter::Create(
    const TokenStoreOptions& options, const Tokenizer& tokenizer) {
  DatasetInfo like;
  like.kind = options.sft ? "sft" : "pretrain";
  like.vocab_size = tokenizer.vocab_size();
  like.bos_id = tokenizer.bos_id();
  like.eos_id = tokenizer.eos_id();
  like.pad_id = tokenizer.pad_id();
  like.unk_id = tokenizer.unk_id();
  like.tokenizer_name = tokenizer.name();
  like.tokenizer_fingerprint = tokenizer.fingerprint();
  like.added_tokens = static_cast<int64_t>(tokenizer.added_tokens().size());
  like.add_bos = options.add_bos && like.bos_id >= 0;
  like.add_eos = options.add_eos && like.eos_id >= 0;
  return CreateLike(options, like);
}

StatusOr<std::unique_ptr<TokenStoreWriter>> TokenStoreWriter::CreateLike(
    const TokenStoreOptions& options, const DatasetInfo& like) {
  if (PathExists(options.directory + "/dataset.json")) {
    return MakeError(
        ExitCode::kIo, "DS-EXISTS",
        options.directory + ": there is a dataset already; choose another directory or remove it");
  }
  SALA_RETURN_IF_ERROR(MakeDirectories(options.directory));
  std::unique_ptr<TokenStoreWriter> writer(new TokenStoreWriter());
  writer->options_ = options;
  DatasetInfo& info = writer->info_;
  info.directory = options.directory;
  info.name = options.name;
  info.kind = like.kind;
  info.vocab_size = like.vocab_size;
  info.token_dtype = info.vocab_size <= 65536 ? "u16" : "u32";
  info.bos_id = like.bos_id;
  info.eos_id = like.eos_id;
  info.pad_id = like.pad_id;
  info.unk_id = like.unk_id;
  info.tokenizer_name = like.tokenizer_name;
  info.tokenizer_fingerprint = like.tokenizer_fingerprint;
  info.added_tokens = like.added_tokens;
  info.add_bos = like.add_bos;
  info.add_eos = like.add_eos;
  return writer;
}

int64_t TokenStoreWriter::AddSource(const std::string& name, const std::string& license,
                                    const std::string& note) {
  info_.sources.push_back({.name = name, .license = license, .note = note});
  return static_cast<int64_t>(info_.sources.size()) - 1;
}

Status TokenStoreWriter::Add(const TokenDocument& document) {
  const int64_t length = static_cast<int64_t>(document.tokens.size());
  SALA_CHECK(document.source >= 0 && document.source < static_cast<int64_t>(info_.sources.size()));
  SALA_CHECK(info_.sft() ? document.loss_mask.size() == document.tokens.size()
                         : document.loss_mask.empty());
  SALA_CHECK(length > 0) << "an empty document";
  for (const int32_t id : document.tokens) {
    if (id < 0 || id >= info_.vocab_size) {
      return MakeError(ExitCode::kData, "DS-RANGE",
                       options_.directory + ": document " + std::to_string(info_.documents) +
                           " has token id " + std::to_string(id) + ", expected 0 to " +
                           std::to_string(info_.vocab_size - 1) +
                           "; name the tokenizer it was made with");
    }
  }
  if (!shard_.tokens.empty() &&
      static_cast<int64_t>(shard_.tokens.size()) + length > options_.shard_tokens)
    SALA_RETURN_IF_ERROR(FlushShard());
  shard_.tokens.insert(shard_.tokens.end(), document.tokens.begin(), document.tokens.end());
  shard_.loss_mask.insert(shard_.loss_mask.end(), document.loss_mask.begin(),
                          document.loss_mask.end());
  shard_.doc_offsets.push_back(shard_.tokens.size());
  shard_.doc_source.push_back(static_cast<uint16_t>(document.source));
  shard_.doc_hash.push_back(document.hash);
  ++info_.documents;
  info_.tokens += length;
  // The first token of a document is nobody's target.
  info_.target_tokens +=
      info_.sft() ? std::count(document.loss_mask.begin() + 1, document.loss_mask.end(), 1)
                  : length - 1;
  ++info_.length_histogram[static_cast<size_t>(std::bit_width(static_cast<uint64_t>(length)) - 1)];
  auto& source = info_.sources[static_cast<size_t>(document.source)];
  ++source.documents;
  source.tokens += length;
  return OkStatus();
}

Status TokenStoreWriter::FlushShard() {
  char name[32];
  std::snprintf(name, sizeof name, "tokens-%05zu.h5", info_.files.size());
  const std::string path = options_.directory + "/" + name;
  SALA_RETURN_IF_ERROR(WriteShard(path, shard_,
                                  {.kind = info_.kind,
                                   .tokenizer_fingerprint = info_.tokenizer_fingerprint,
                                   .vocab_size = info_.vocab_size,
                                   .shard_index = static_cast<int64_t>(info_.files.size())}));
  DatasetFile file;
  file.name = name;
  SALA_ASSIGN_OR_RETURN(file.bytes, FileSize(path));
  SALA_ASSIGN_OR_RETURN(file.sha256, Sha256OfFile(path));
  file.documents = shard_.documents();
  file.tokens = static_cast<int64_t>(shard_.tokens.size());
  for (size_t d = 0; d + 1 < shard_.doc_offsets.size(); ++d)
    file.max_document = std::max(
        file.max_document, static_cast<int64_t>(shard_.doc_offsets[d + 1] - shard_.doc_offsets[d]));
  info_.files.push_back(file);
  shard_ = ShardContent();
  return OkStatus();
}

StatusOr<DatasetInfo> TokenStoreWriter::Finish(const json& ingest) {
  if (!shard_.tokens.empty()) SALA_RETURN_IF_ERROR(FlushShard());
  info_.ingest = ingest;
  const std::string text = WithSelfCrc(ToJson(info_).dump(2) + "\n");
  SALA_RETURN_IF_ERROR(WriteFileAtomically(options_.directory + "/dataset.json", text));
  return ReadDatasetInfo(options_.directory);
}

}  // namespace sala::data
