#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "core/checkpoint.h"
#include "core/checkpoint_format.h"
#include "core/file.h"
#include "core/hash.h"

namespace sala {
namespace {

using nlohmann::json;

Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

constexpr char kOtherModel[] = "; the checkpoint is of another model, name the right one";

bool IsHdf5(const std::string& name) {
  return name.size() > 3 && name.compare(name.size() - 3, 3, ".h5") == 0;
}

bool IsPlainName(const std::string& name) {
  return !name.empty() && name[0] != '.' && name.find('/') == std::string::npos;
}

// Fills `info` from a manifest whose CRC is right; throws json::exception where a field is missing
// or of another type.
void ReadInfo(const json& manifest, CheckpointInfo* info) {
  info->save_id = manifest.at("save_id").get<std::string>();
  info->global_step = manifest.at("global_step").get<int64_t>();
  info->stage = manifest.at("stage");
  info->program = manifest.at("program");
  info->topology = manifest.at("topology");
  info->model = manifest.at("model");
  info->tokenizer_fingerprint = manifest.at("tokenizer_fingerprint").get<std::string>();
  info->trainer = manifest.at("trainer");
  info->parent = manifest.at("parent");
  for (const json& file : manifest.at("files")) {
    if (!IsPlainName(file.at("name").get<std::string>()) || file.at("bytes").get<int64_t>() < 0 ||
        file.at("crc32c").get<std::string>().size() != 8) {
      throw json::other_error::create(501, "bad file record " + Printable(file.dump()), nullptr);
    }
  }
}

// Why there is no checkpoint at `directory`; `problem` is what reading its manifest gave.
std::string WhyNone(const std::string& directory, const Status& problem) {
  if (!PathExists(directory)) return "does not exist";
  if (IsDirectory(directory + "/checkpoints"))
    return "is a run directory; name one of its checkpoints, which sala ckpt list shows";
  return "no complete checkpoint here: " + MessageOf(problem);
}

StatusOr<json> ReadManifest(const std::string& directory, CheckpointInfo* info) {
  const std::string path = directory + "/" + checkpoint::kManifestName;
  const StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) {
    return DataError("CKPT-NONE", Printable(directory) + ": " + WhyNone(directory, text.status()));
  }
  if (!checkpoint::ManifestIsIntact(*text)) {
    return DataError(
        "CKPT-MANIFEST",
        path + ": the manifest does not match its own CRC; restore it or use another checkpoint");
  }
  try {
    json manifest = json::parse(*text);
    if (manifest.at("format") != "checkpoint") {
      return DataError(
          "CKPT-MANIFEST",
          path + ": not the manifest of a checkpoint; restore it or use another checkpoint");
    }
    const auto version = manifest.at("version").get<int64_t>();
    if (version > checkpoint::kVersion) {
      return DataError("CKPT-VERSION", path + ": format version " + std::to_string(version) +
                                           ", this program reads up to " +
                                           std::to_string(checkpoint::kVersion) +
                                           "; use a newer program");
    }
    ReadInfo(manifest, info);
    return manifest;
  } catch (const json::exception& e) {
    return DataError("CKPT-MANIFEST",
                     path + ": a field is missing or damaged: " + Printable(e.what()) +
                         "; restore it or use another checkpoint");
  }
}

// The save id stands as plain text near the start of each HDF5 file, so it can be compared before
// anything is parsed.
Status CheckSaveId(const std::string& path, const std::string& save_id, int64_t bytes) {
  constexpr int64_t kHeadBytes = 64 << 10;
  std::string head(static_cast<size_t>(std::min(kHeadBytes, bytes)), '\0');
  SALA_RETURN_IF_ERROR(ReadAt(path, 0, head.data(), head.size()));
  if (head.find(save_id) != std::string::npos) return OkStatus();
  if (head.find("save_id") != std::string::npos) {
    return DataError("CKPT-MIXED", path + ": belongs to another save than the manifest (save_id " +
                                       Printable(save_id) +
                                       "), or its header is damaged; restore the right file");
  }
  return DataError("CKPT-CRC",
                   path + ": the header is damaged: no save id found; restore the file");
}

Status CheckFileCrc(const std::string& directory, const json& record) {
  const std::string path = directory + "/" + record["name"].get<std::string>();
  SALA_ASSIGN_OR_RETURN(const uint32_t crc,
                        checkpoint::FileCrc(path, record["bytes"].get<int64_t>()));
  if (Hex32(crc) == record["crc32c"].get<std::string>()) return OkStatus();
  return DataError("CKPT-CRC", path + ": the file's CRC is " + Hex32(crc) + ", the manifest says " +
                                   Printable(record["crc32c"].get<std::string>()) +
                                   "; restore the file or use another checkpoint");
}

template <typename T>
void ConvertAs(const char* from, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    out[i] = static_cast<float>(value);
  }
}

void ConvertToF32(DType dtype, const char* from, int64_t n, float* out) {
  switch (dtype) {
    case DType::kF32:
      return ConvertAs<float>(from, n, out);
    case DType::kBF16:
      return ConvertAs<BF16>(from, n, out);
    case DType::kF64:
      return ConvertAs<double>(from, n, out);
    case DType::kI32:
      return ConvertAs<int32_t>(from, n, out);
    case DType::kI64:
      return ConvertAs<int64_t>(from, n, out);
    case DType::kU8:
      return ConvertAs<uint8_t>(from, n, out);
    case DType::kU16:
      return ConvertAs<uint16_t>(from, n, out);
  }
}

bool IsFloat(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF64;
}

std::string TensorText(const std::string& name, TensorKind kind) {
  return "tensor `" + Printable(name) + "` (" + std::string(NameOf(kind)) + ")";
}

}  // namespace

StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  SALA_ASSIGN_OR_RETURN(checkpoint.manifest_, ReadManifest(directory, &checkpoint.info_));
  SALA_RETURN_IF_ERROR(checkpoint.CheckFiles());
  std::map<std::string, int64_t> sizes;
  const json* index_record = nullptr;
  for (const json& file : checkpoint.manifest_["files"]) {
    sizes[file["name"].get<std::string>()] = file["bytes"].get<int64_t>();
    if (file["name"] == checkpoint::kIndexName) index_record = &file;
  }
  if (index_record == nullptr) {
    return DataError("CKPT-MANIFEST", directory + "/" + checkpoint::kManifestName + ": lists no " +
                                          checkpoint::kIndexName + "; use another checkpoint");
  }
  SALA_RETURN_IF_ERROR(
      CheckFileCrc(directory, *index_record));  // before the HDF5 library parses it
  SALA_ASSIGN_OR_RETURN(
      checkpoint::Index index,
      checkpoint::ReadIndex(directory + "/" + checkpoint::kIndexName, [&](const std::string& name) {
        const auto at = sizes.find(name);
        return at == sizes.end() ? int64_t{-1} : at->second;
      }));
  checkpoint.tensors_ = std::move(index.tensors);
  checkpoint.slices_ = std::move(index.slices);
  std::stable_sort(checkpoint.slices_.begin(), checkpoint.slices_.end(),
                   [](const StoredSlice& a, const StoredSlice& b) { return a.tensor < b.tensor; });
  return checkpoint;
}

Status Checkpoint::CheckFiles() const {
  for (const json& file : manifest_["files"]) {
    const std::string name = file["name"].get<std::string>();
    const std::string path = directory_ + "/" + name;
    const auto expected = file["bytes"].get<int64_t>();
    const StatusOr<int64_t> size = FileSize(path);
    if (!size.ok()) {
      return DataError("CKPT-SIZE",
                       path +
                           ": cannot be found, the manifest lists it; restore it or use another "
                           "checkpoint");
    }
    if (*size != expected) {
      return DataError("CKPT-SIZE", path + ": the file has " + std::to_string(*size) +
                                        " bytes, the manifest says " + std::to_string(expected) +
                                        "; restore it or use another checkpoint");
    }
    if (IsHdf5(name)) SALA_RETURN_IF_ERROR(CheckSaveId(path, info_.save_id, expected));
  }
  return OkStatus();
}

const StoredTensor* Checkpoint::Find(const std::string& name, TensorKind kind) const {
  const auto at =
      std::lower_bound(tensors_.begin(), tensors_.end(), std::make_pair(name, kind),
                       [](const StoredTensor& t, const std::pair<std::string, TensorKind>& key) {
                         return std::tie(t.name, t.kind) < std::tie(key.first, key.second);
                       });
  return at != tensors_.end() && at->name == name && at->kind == kind ? &*at : nullptr;
}

std::pair<size_t, size_t> Checkpoint::SlicesOf(size_t tensor) const {
  const auto first =
      std::lower_bound(slices_.begin(), slices_.end(), tensor,
                       [](const StoredSlice& s, size_t id) { return s.tensor < id; });
  const auto last = std::upper_bound(slices_.begin(), slices_.end(), tensor,
                                     [](size_t id, const StoredSlice& s) { return id < s.tensor; });
  return {static_cast<size_t>(first - slices_.begin()),
          static_cast<size_t>(last - slices_.begin())};
}

std::string Checkpoint::Describe(const StoredSlice& slice) const {
  const StoredTensor& tensor = tensors_[slice.tensor];
  std::string box;
  if (slice.box_shape != tensor.shape) {
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      box += (d > 0 ? ", " : " of box [") + std::to_string(slice.box_offset[d]) + ":" +
             std::to_string(slice.box_offset[d] + slice.box_shape[d]);
    }
    box += "]";
  }
  return directory_ + "/" + slice.file + ": " + TensorText(tensor.name, tensor.kind) + ", slice [" +
         std::to_string(slice.flat_begin) + ", " + std::to_string(slice.flat_end) + ")" + box +
         " at byte " + std::to_string(slice.byte_offset);
}

Status Checkpoint::ReadSlice(const StoredSlice& slice, std::vector<char>* bytes) const {
  bytes->resize(static_cast<size_t>(slice.bytes));
  SALA_RETURN_IF_ERROR(
      ReadAt(directory_ + "/" + slice.file, slice.byte_offset, bytes->data(), bytes->size()));
  const uint32_t crc = Crc32c(bytes->data(), bytes->size());
  if (crc == slice.crc) return OkStatus();
  return DataError("CKPT-CRC", Describe(slice) + ": CRC is " + Hex32(crc) + ", the index says " +
                                   Hex32(slice.crc) +
                                   "; restore the file or use another checkpoint");
}

Status Checkpoint::ReadRanges(const StoredTensor& tensor, const std::vector<Wanted>& wanted,
                              void* out) const {
  const int64_t elements = checkpoint::CheckedElements(tensor.shape);
  const StoredTensor* own = Find(tensor.name, tensor.kind);
  const auto [first, last] = SlicesOf(static_cast<size_t>(own - tensors_.data()));
  for (const Wanted& range : wanted) {
    if (range.begin < 0 || range.begin > range.end || range.end > elements) {
      return DataError("CKPT-TENSOR", directory_ + ": " + TensorText(tensor.name, tensor.kind) +
                                          " has " + std::to_string(elements) +
                                          " elements, asked for [" + std::to_string(range.begin) +
                                          ", " + std::to_string(range.end) + ")" + kOtherModel);
    }
  }
  if (wanted.empty()) return OkStatus();
  const Status cover = checkpoint::CheckCover(*own, slices_.data() + first, slices_.data() + last,
                                              wanted.front().begin, wanted.back().end);
  if (!cover.ok()) return Annotate(cover, directory_);
  const auto size = static_cast<int64_t>(SizeOf(own->dtype));
  std::vector<char> bytes;
  for (size_t s = first; s < last; ++s) {
    bool read = false;
    Status status;
    checkpoint::ForEachRun(own->shape, slices_[s], [&](const checkpoint::Run& run) {
      auto range = std::partition_point(
          wanted.begin(), wanted.end(),
          [&run](const Wanted& range_before) { return range_before.end <= run.tensor_begin; });
      for (; range != wanted.end() && range->begin < run.tensor_begin + run.count; ++range) {
        const int64_t a = std::max(range->begin, run.tensor_begin);
        const int64_t b = std::min(range->end, run.tensor_begin + run.count);
        if (a >= b || !status.ok()) continue;
        if (!read) status = ReadSlice(slices_[s], &bytes);
        read = true;
        if (!status.ok()) return;
        std::memcpy(static_cast<char*>(out) + (range->out + a - range->begin) * size,
                    bytes.data() + (run.slice_begin + a - run.tensor_begin) * size,
                    static_cast<size_t>((b - a) * size));
      }
    });
    SALA_RETURN_IF_ERROR(status);
  }
  return OkStatus();
}

Status Checkpoint::ReadRaw(const StoredTensor& tensor, int64_t begin, int64_t end,
                           void* out) const {
  return ReadRanges(tensor, {{.begin = begin, .end = end, .out = 0}}, out);
}

Status Checkpoint::ReadRangesF32(const std::string& name, TensorKind kind,
                                 const std::vector<Wanted>& wanted, float* out) const {
  const StoredTensor* tensor = Find(name, kind);
  if (tensor == nullptr) {
    return DataError("CKPT-TENSOR", directory_ + ": no " + TensorText(name, kind) +
                                        " in this checkpoint" + kOtherModel);
  }
  if (tensor->dtype == DType::kF32) return ReadRanges(*tensor, wanted, out);
  int64_t elements = 0;
  for (const Wanted& range : wanted)
    elements = std::max(elements, range.out + std::max<int64_t>(0, range.end - range.begin));
  std::vector<char> bytes(static_cast<size_t>(elements) * SizeOf(tensor->dtype));
  SALA_RETURN_IF_ERROR(ReadRanges(*tensor, wanted, bytes.data()));
  ConvertToF32(tensor->dtype, bytes.data(), elements, out);
  return OkStatus();
}

Status Checkpoint::ReadF32(const std::string& name, TensorKind kind, int64_t begin, int64_t end,
                           float* out) const {
  return ReadRangesF32(name, kind, {{.begin = begin, .end = end, .out = 0}}, out);
}

Status Checkpoint::ReadBoxF32(const std::string& name, TensorKind kind,
                              const std::vector<int64_t>& offset, const std::vector<int64_t>& box,
                              int64_t begin, int64_t end, float* out) const {
  const StoredTensor* tensor = Find(name, kind);
  if (tensor != nullptr && tensor->shape.size() != box.size()) {
    return DataError("CKPT-TENSOR", directory_ + ": " + TensorText(name, kind) + " has " +
                                        std::to_string(tensor->shape.size()) +
                                        " dimensions, expected " + std::to_string(box.size()) +
                                        kOtherModel);
  }
  const bool rows_are_whole = tensor == nullptr || box.size() == 1 || box[1] == tensor->shape[1];
  const int64_t width = box.back();
  std::vector<Wanted> wanted;
  if (rows_are_whole) {  // the box is one range
    const int64_t first = box.size() == 1 ? offset[0] : offset[0] * width;
    wanted.push_back({.begin = first + begin, .end = first + end, .out = 0});
  } else {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / width;
      const int64_t stop = std::min(end, (row + 1) * width);
      const int64_t first = (offset[0] + row) * tensor->shape[1] + offset[1] + (at - row * width);
      wanted.push_back({.begin = first, .end = first + stop - at, .out = at - begin});
      at = stop;
    }
  }
  return ReadRangesF32(name, kind, wanted, out);
}

StatusOr<std::string> Checkpoint::ReadConfig() const { return ReadExtra(checkpoint::kConfigName); }

StatusOr<std::string> Checkpoint::ReadExtra(const std::string& name) const {
  for (const json& file : manifest_["files"]) {
    if (file["name"] != name) continue;
    SALA_RETURN_IF_ERROR(CheckFileCrc(directory_, file));
    return ReadFile(directory_ + "/" + name);
  }
  return DataError("CKPT-MANIFEST", directory_ + ": the manifest lists no file " + Printable(name) +
                                        "; use another checkpoint");
}

Status Checkpoint::CheckSlice(const StoredSlice& slice, bool finite) const {
  std::vector<char> bytes;
  SALA_RETURN_IF_ERROR(ReadSlice(slice, &bytes));
  const StoredTensor& tensor = tensors_[slice.tensor];
  if (!finite || !IsFloat(tensor.dtype)) return OkStatus();
  const int64_t n = slice.flat_end - slice.flat_begin;
  const auto bad_at = [&](int64_t i) {
    return DataError("CKPT-TENSOR", Describe(slice) + ": element " +
                                        std::to_string(slice.flat_begin + i) +
                                        " is not finite (NaN or Inf); use an earlier checkpoint");
  };
  if (tensor.dtype == DType::kF64) {  // a large finite double is no Inf
    for (int64_t i = 0; i < n; ++i) {
      double value = 0;
      std::memcpy(&value, bytes.data() + i * 8, 8);
      if (!std::isfinite(value)) return bad_at(i);
    }
    return OkStatus();
  }
  std::vector<float> values(static_cast<size_t>(n));
  ConvertToF32(tensor.dtype, bytes.data(), n, values.data());
  const auto bad =
      std::find_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
  return bad == values.end() ? OkStatus() : bad_at(bad - values.begin());
}

Status Checkpoint::Verify(VerifyLevel level) const {
  SALA_RETURN_IF_ERROR(CheckFiles());
  if (level == VerifyLevel::kQuick) return OkStatus();
  // Slices first: their messages say which tensor is hit. The files' CRCs then cover headers and
  // padding.
  for (const StoredSlice& slice : slices_)
    SALA_RETURN_IF_ERROR(CheckSlice(slice, level == VerifyLevel::kDeep));
  for (const json& file : manifest_["files"]) SALA_RETURN_IF_ERROR(CheckFileCrc(directory_, file));
  if (level == VerifyLevel::kFull) return OkStatus();
  for (size_t t = 0; t < tensors_.size(); ++t) {
    const auto [first, last] = SlicesOf(t);
    const Status cover =
        checkpoint::CheckCover(tensors_[t], slices_.data() + first, slices_.data() + last, 0,
                               checkpoint::CheckedElements(tensors_[t].shape));
    if (!cover.ok()) return Annotate(cover, directory_);
  }
  return OkStatus();
}

}  // namespace sala
