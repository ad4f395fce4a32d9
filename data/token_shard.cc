#include "data/token_shard.h"

#include <algorithm>
#include <string_view>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/hdf5.h"

namespace sala::data {
namespace {

constexpr char kRestore[] = "; restore the file or ingest again";

Status FormatError(const std::string& path, const std::string& text) {
  return MakeError(ExitCode::kData, "DS-FORMAT", path + ": " + text + kRestore);
}

std::vector<uint32_t> BlockCrcs(const void* data, int64_t bytes) {
  std::vector<uint32_t> crcs;
  for (int64_t begin = 0; begin < bytes; begin += kCrcBlockBytes) {
    const int64_t n = std::min(kCrcBlockBytes, bytes - begin);
    crcs.push_back(Crc32c(static_cast<const char*>(data) + begin, static_cast<size_t>(n)));
  }
  return crcs;
}

template <typename T>
Status WriteArray(Hdf5Writer& file, const std::string& name, Hdf5Type type,
                  const std::vector<T>& values) {
  const int64_t count = static_cast<int64_t>(values.size());
  SALA_CHECK(SizeOf(type) == sizeof(T)) << name;
  SALA_RETURN_IF_ERROR(file.WriteDataset("/" + name, type, {count}, values.data()));
  const std::vector<uint32_t> crcs =
      BlockCrcs(values.data(), count * static_cast<int64_t>(sizeof(T)));
  return file.WriteDataset("/crc/" + name, Hdf5Type::kU32, {static_cast<int64_t>(crcs.size())},
                           crcs.data());
}

Status WriteContent(Hdf5Writer& file, const ShardContent& content, const ShardHeader& header) {
  SALA_RETURN_IF_ERROR(file.WriteAttribute("format", "token-shard"));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("version", int64_t{kShardVersion}));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("kind", header.kind));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("vocab_size", header.vocab_size));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("tokenizer_fingerprint", header.tokenizer_fingerprint));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("n_documents", header.documents));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("n_tokens", header.tokens));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("shard_index", header.shard_index));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("crc_block_bytes", kCrcBlockBytes));
  if (header.vocab_size <= 65536) {
    const std::vector<uint16_t> narrow(content.tokens.begin(), content.tokens.end());
    SALA_RETURN_IF_ERROR(WriteArray(file, "tokens", Hdf5Type::kU16, narrow));
  } else {
    const std::vector<uint32_t> wide(content.tokens.begin(), content.tokens.end());
    SALA_RETURN_IF_ERROR(WriteArray(file, "tokens", Hdf5Type::kU32, wide));
  }
  SALA_RETURN_IF_ERROR(WriteArray(file, "doc_offsets", Hdf5Type::kU64, content.doc_offsets));
  SALA_RETURN_IF_ERROR(WriteArray(file, "doc_source", Hdf5Type::kU16, content.doc_source));
  SALA_RETURN_IF_ERROR(WriteArray(file, "doc_hash", Hdf5Type::kU64, content.doc_hash));
  if (header.kind == "sft")
    SALA_RETURN_IF_ERROR(WriteArray(file, "loss_mask", Hdf5Type::kU8, content.loss_mask));
  return file.Close();
}

StatusOr<ShardHeader> ReadHeader(const Hdf5Reader& file, const std::string& path) {
  ShardHeader header;
  for (const char* name : {"format", "version", "kind", "vocab_size", "tokenizer_fingerprint",
                           "n_documents", "n_tokens", "shard_index", "crc_block_bytes"}) {
    if (!file.HasAttribute(name))
      return FormatError(path, std::string("no attribute ") + name + "; not a token file of ours");
  }
  SALA_ASSIGN_OR_RETURN(const std::string format, file.StringAttribute("format"));
  if (format != "token-shard")
    return FormatError(path, "format is \"" + Printable(format) + "\", expected token-shard");
  SALA_ASSIGN_OR_RETURN(const int64_t version, file.IntAttribute("version"));
  if (version != kShardVersion) {
    return MakeError(ExitCode::kData, "DS-VERSION",
                     path + ": version " + std::to_string(version) + ", this program reads " +
                         std::to_string(kShardVersion) + "; use a newer program");
  }
  SALA_ASSIGN_OR_RETURN(const int64_t block, file.IntAttribute("crc_block_bytes"));
  if (block != kCrcBlockBytes)
    return FormatError(path, "crc_block_bytes is " + std::to_string(block) + ", expected " +
                                 std::to_string(kCrcBlockBytes));
  SALA_ASSIGN_OR_RETURN(header.kind, file.StringAttribute("kind"));
  SALA_ASSIGN_OR_RETURN(header.tokenizer_fingerprint,
                        file.StringAttribute("tokenizer_fingerprint"));
  SALA_ASSIGN_OR_RETURN(header.vocab_size, file.IntAttribute("vocab_size"));
  SALA_ASSIGN_OR_RETURN(header.documents, file.IntAttribute("n_documents"));
  SALA_ASSIGN_OR_RETURN(header.tokens, file.IntAttribute("n_tokens"));
  SALA_ASSIGN_OR_RETURN(header.shard_index, file.IntAttribute("shard_index"));
  if (header.documents < 1 || header.tokens < header.documents) {
    return FormatError(path, std::to_string(header.documents) + " documents and " +
                                 std::to_string(header.tokens) + " tokens cannot be");
  }
  return header;
}

// An error of the HDF5 wrapper about a file that should be ours, under our code.
Status AsFormat(const Status& status) {
  if (ErrorCodeOf(status) != "HDF5-FORMAT") return status;
  std::string text = MessageOf(status);
  const std::string code = "HDF5-FORMAT: ";
  if (text.rfind(code, 0) == 0) text.erase(0, code.size());
  return MakeError(ExitCode::kData, "DS-FORMAT", text + kRestore);
}

Status AddArray(const Hdf5Reader& file, const std::string& path, const std::string& name,
                Hdf5Type type, int64_t count, ShardLayout* layout) {
  auto info = file.Expect(name, type, {count});
  if (!info.ok()) return AsFormat(info.status());
  if (!info->contiguous && info->bytes > 0)
    return FormatError(
        path, "/" + name + " is not stored in one piece (repacked?); ingest the data again");
  (*layout).arrays[name] = {info->byte_offset, info->shape[0], static_cast<int64_t>(SizeOf(type))};
  return OkStatus();
}

}  // namespace

Status WriteShard(const std::string& path, const ShardContent& content, ShardHeader header) {
  header.documents = content.documents();
  header.tokens = static_cast<int64_t>(content.tokens.size());
  const std::string temporary = path + ".tmp";
  SALA_ASSIGN_OR_RETURN(Hdf5Writer file, Hdf5Writer::Create(temporary));
  SALA_RETURN_IF_ERROR(WriteContent(file, content, header));
  SALA_RETURN_IF_ERROR(RenamePath(temporary, path));
  return FsyncDirectory(path.substr(0, path.find_last_of('/')));
}

StatusOr<ShardLayout> ReadShardLayout(const std::string& path) {
  auto opened = Hdf5Reader::Open(path);
  if (!opened.ok()) return AsFormat(opened.status());
  const Hdf5Reader& file = *opened;
  ShardLayout layout;
  SALA_ASSIGN_OR_RETURN(layout.header, ReadHeader(file, path));
  const ShardHeader& header = layout.header;
  struct Expected {
    const char* name;
    Hdf5Type type;
    int64_t count;
  };
  std::vector<Expected> arrays = {
      {"tokens", header.vocab_size <= 65536 ? Hdf5Type::kU16 : Hdf5Type::kU32, header.tokens},
      {"doc_offsets", Hdf5Type::kU64, header.documents + 1},
      {"doc_source", Hdf5Type::kU16, header.documents},
      {"doc_hash", Hdf5Type::kU64, header.documents}};
  if (header.kind == "sft") arrays.push_back({"loss_mask", Hdf5Type::kU8, header.tokens});
  for (const Expected& array : arrays) {
    SALA_RETURN_IF_ERROR(AddArray(file, path, array.name, array.type, array.count, &layout));
    SALA_RETURN_IF_ERROR(
        AddArray(file, path, std::string("crc/") + array.name, Hdf5Type::kU32, -1, &layout));
  }
  return layout;
}

}  // namespace sala::data
