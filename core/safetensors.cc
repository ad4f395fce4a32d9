#include "core/safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <optional>
#include <system_error>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "core/half.h"
#include "core/safetensors_header.h"
#include "nlohmann/json.hpp"

namespace sala {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

// The name the format gives the number type.
std::string TypeOf(const SafetensorsTensor& tensor) {
  if (!tensor.type.empty()) return tensor.type;
  std::string name(NameOf(tensor.dtype));
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return std::toupper(c); });
  return name;
}

int64_t BytesOf(const SafetensorsTensor& tensor) {
  auto bytes = static_cast<int64_t>(SizeOf(tensor.dtype));
  for (const int64_t d : tensor.shape) {
    SALA_CHECK(d >= 0 && !__builtin_mul_overflow(bytes, d, &bytes)) << "shape of " << tensor.name;
  }
  return bytes;
}

template <typename T, typename Convert>
void ConvertAll(const char* from, int64_t n, float* out, Convert convert) {
  for (int64_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    out[i] = convert(value);
  }
}

std::string ShapeText(const std::vector<int64_t>& shape) { return json(shape).dump(); }

// `n` elements of this type in a row. False: no type of weights.
bool ConvertToF32(const std::string& dtype, const char* from, int64_t n, float* out) {
  if (dtype == "F32") {
    ConvertAll<float>(from, n, out, [](float x) { return x; });
  } else if (dtype == "BF16") {
    ConvertAll<BF16>(from, n, out, [](BF16 x) { return static_cast<float>(x); });
  } else if (dtype == "F16") {
    ConvertAll<uint16_t>(from, n, out, HalfToFloat);
  } else if (dtype == "F64") {
    ConvertAll<double>(from, n, out, [](double x) { return static_cast<float>(x); });
  } else {
    return false;
  }
  return true;
}

// Appends to a file without holding all of it in memory.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path)
      : path_(path),
        fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)),
        error_(fd_ < 0 ? errno : 0) {}
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  void Append(const char* data, size_t bytes) {
    while (bytes > 0 && error_ == 0) {
      const ssize_t n = ::write(fd_, data, bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) {
        error_ = errno;
        return;
      }
      data += n;
      bytes -= static_cast<size_t>(n);
    }
  }
  // Zeros that the file system need not store.
  void Skip(int64_t bytes) {
    if (error_ != 0) return;
    const off_t end = ::lseek(fd_, static_cast<off_t>(bytes), SEEK_CUR);
    if (end < 0 || ::ftruncate(fd_, end) != 0) error_ = errno;
  }
  Status Finish() {
    if (error_ == 0 && ::fsync(fd_) != 0) error_ = errno;
    if (error_ == 0) return OkStatus();
    return MakeError(ExitCode::kIo, "FILE-WRITE",
                     path_ + ": cannot write: " + std::generic_category().message(error_));
  }

 private:
  std::string path_;
  int fd_;
  int error_;
};

struct Index {
  std::map<std::string, std::string> weight_map;  // file of each tensor
  std::optional<int64_t> total_size;              // bytes of all tensors
};

// Every value is checked before use.
StatusOr<Index> ParseIndex(const std::string& text, const std::string& path) {
  StatusOr<json> root = ParseUniqueJson(text, "the index");
  if (!root.ok()) return Annotate(root.status(), path);
  const auto map = root->find("weight_map");
  if (map == root->end() || !map->is_object())
    return DataError("ST-JSON", path + ": no object weight_map; fetch the file again");
  Index index;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string() || !IsWeightsFileName(file.get<std::string>())) {
      return DataError("ST-PATH",
                       path + ": tensor `" + Printable(tensor) + "`: " + Printable(file.dump()) +
                           " is not a plain file name NAME.safetensors inside the folder; "
                           "fetch the folder again");
    }
    index.weight_map[tensor] = file.get<std::string>();
  }
  const json metadata = root->value("metadata", json());
  if (metadata.is_null()) return index;
  if (!metadata.is_object())
    return DataError("ST-JSON", path + ": metadata is not an object; fetch the file again");
  const json total = metadata.value("total_size", json());
  if (total.is_null()) return index;
  // Some programs write it as 1234.0.
  const double size = total.is_number() ? total.get<double>() : -1;
  constexpr double kExactIntegers = 9007199254740992.0;  // 2^53
  if (!(size >= 0 && size < kExactIntegers && size == std::floor(size))) {
    return DataError("ST-SIZE", path + ": metadata.total_size is " + Printable(total.dump()) +
                                    ", expected a number of bytes; fetch the file again");
  }
  index.total_size = static_cast<int64_t>(size);
  return index;
}

Status CheckTotalSize(const Index& index, const std::vector<SafetensorsFile>& files,
                      const std::string& path) {
  int64_t total = 0;
  for (const SafetensorsFile& file : files) {
    for (const SafetensorsEntry& entry : file.entries()) total += entry.bytes;
  }
  if (!index.total_size || *index.total_size == total) return OkStatus();
  return DataError("ST-SIZE", path + ": metadata.total_size is " +
                                  std::to_string(*index.total_size) + ", the tensors have " +
                                  std::to_string(total) + " bytes; fetch the folder again");
}

// A folder without safetensors: what it holds instead.
Status NoModel(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  for (const std::string& name : names) {
    const std::string extension = std::filesystem::path(name).extension().string();
    if (name.rfind("pytorch_model", 0) == 0 || extension == ".pth" || extension == ".pt") {
      return DataError("ST-FORMAT", directory + ": found " + Printable(name) +
                                        ", a pickle file: loading one runs code from it, so it is "
                                        "not read; convert the model to safetensors");
    }
    if (extension == ".gguf") {
      return DataError("ST-FORMAT", directory + ": found " + Printable(name) +
                                        ", a GGUF file, whose weights are made for inference; "
                                        "take the model's safetensors folder");
    }
  }
  return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                   directory + ": neither " + SafetensorsModel::kSingleName + " nor " +
                       SafetensorsModel::kIndexName + " is here; name the folder of a model");
}

// Header and tensors in this order under a temporary name, then renamed.
Status WriteFileOf(const std::string& path, const std::string& header,
                   const std::vector<const SafetensorsTensor*>& tensors) {
  const uint64_t length = header.size();
  std::array<char, 8> prefix{};
  std::memcpy(prefix.data(), &length, prefix.size());
  const std::string temporary = path + ".tmp";
  OutputFile file(temporary);
  file.Append(prefix.data(), prefix.size());
  file.Append(header.data(), header.size());
  for (const SafetensorsTensor* tensor : tensors) {
    if (tensor->data == nullptr) {
      file.Skip(BytesOf(*tensor));
    } else {
      file.Append(static_cast<const char*>(tensor->data), static_cast<size_t>(BytesOf(*tensor)));
    }
  }
  Status status = file.Finish();
  if (status.ok()) status = RenamePath(temporary, path);
  if (!status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return FsyncDirectory(parent.empty() ? "." : parent);
}

// Which tensors go into one file, as the Hugging Face libraries cut models.
std::vector<std::vector<SafetensorsTensor>> CutIntoShards(
    const std::vector<SafetensorsTensor>& tensors, int64_t max_shard_bytes) {
  std::vector<std::vector<SafetensorsTensor>> shards;
  std::vector<SafetensorsTensor> open;
  int64_t open_bytes = 0;
  for (const SafetensorsTensor& tensor : tensors) {
    const int64_t bytes = BytesOf(tensor);
    if (bytes > max_shard_bytes) {
      shards.push_back({tensor});
      continue;
    }
    if (open_bytes + bytes > max_shard_bytes) {
      shards.push_back(std::exchange(open, {}));
      open_bytes = 0;
    }
    open.push_back(tensor);
    open_bytes += bytes;
  }
  if (!open.empty() || shards.empty()) shards.push_back(open);
  return shards;
}

}  // namespace

bool IsWeightsFileName(const std::string& name) {
  constexpr std::string_view kEnding = ".safetensors";
  return name.size() > kEnding.size() && name.ends_with(kEnding) &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  SafetensorsFile file;
  SALA_ASSIGN_OR_RETURN(file.file_, MappedFile::Open(path));
  StatusOr<SafetensorsHeader> header =
      ParseSafetensorsHeader({file.file_.data(), file.file_.size()});
  if (!header.ok()) return Annotate(header.status(), path);
  file.entries_ = std::move(header->entries);
  file.metadata_ = std::move(header->metadata);
  return file;
}

std::string_view SafetensorsFile::HeaderText() const {
  uint64_t length = 0;
  std::memcpy(&length, file_.data(), sizeof length);  // checked when the file was opened
  return {file_.data() + sizeof length, length};
}

const SafetensorsEntry* SafetensorsFile::Find(const std::string& name) const {
  for (const SafetensorsEntry& entry : entries_) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

Status WriteSafetensors(const std::string& path, std::vector<SafetensorsTensor> tensors,
                        const std::map<std::string, std::string>& metadata) {
  std::sort(tensors.begin(), tensors.end(),
            [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
              return std::make_tuple(SafetensorsTypeOrder(TypeOf(a)), std::cref(a.name)) <
                     std::make_tuple(SafetensorsTypeOrder(TypeOf(b)), std::cref(b.name));
            });
  ordered_json header = {{"__metadata__", metadata}};
  header["__metadata__"]["format"] = "pt";
  int64_t at = 0;
  std::vector<const SafetensorsTensor*> in_order;
  for (const SafetensorsTensor& tensor : tensors) {
    SALA_CHECK(!header.contains(tensor.name)) << "tensor " << tensor.name << " is given twice";
    const int64_t bytes = BytesOf(tensor);
    header[tensor.name] = {
        {"dtype", TypeOf(tensor)}, {"shape", tensor.shape}, {"data_offsets", {at, at + bytes}}};
    at += bytes;
    in_order.push_back(&tensor);
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  return WriteFileOf(path, text, in_order);
}

Status WriteSafetensorsAs(const std::string& path, const std::string& header,
                          const std::vector<SafetensorsTensor>& tensors) {
  SALA_ASSIGN_OR_RETURN(const json root, ParseUniqueJson(header, "the header"));
  std::vector<const SafetensorsTensor*> in_order;
  int64_t data_bytes = 0;
  for (const SafetensorsTensor& tensor : tensors) {
    if (!root.contains(tensor.name)) continue;
    in_order.push_back(&tensor);
    data_bytes += BytesOf(tensor);
  }
  SALA_ASSIGN_OR_RETURN(const SafetensorsHeader parsed,
                        ParseSafetensorsHeaderText(header, data_bytes));
  SALA_CHECK(parsed.entries.size() == in_order.size()) << path << ": other tensors than the header";
  std::map<std::string, size_t> place;
  for (size_t i = 0; i < parsed.entries.size(); ++i) place[parsed.entries[i].name] = i;
  std::sort(in_order.begin(), in_order.end(),
            [&](const auto* a, const auto* b) { return place.at(a->name) < place.at(b->name); });
  for (size_t i = 0; i < in_order.size(); ++i) {
    SALA_CHECK(parsed.entries[i].dtype == TypeOf(*in_order[i]) &&
               parsed.entries[i].shape == in_order[i]->shape)
        << path << ": tensor " << in_order[i]->name << " is not as in the header";
  }
  return WriteFileOf(path, header, in_order);
}

StatusOr<SafetensorsModel> SafetensorsModel::Open(const std::string& directory) {
  SafetensorsModel model;
  const std::string index_path = directory + "/" + kIndexName;
  Index index;
  const bool sharded = PathExists(index_path);
  if (sharded) {
    SALA_ASSIGN_OR_RETURN(model.index_text_, ReadFile(index_path));
    SALA_ASSIGN_OR_RETURN(index, ParseIndex(model.index_text_, index_path));
    std::vector<std::string>& names = model.file_names_;
    for (const auto& [tensor, file] : index.weight_map) names.push_back(file);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
  } else if (PathExists(directory + "/" + kSingleName)) {
    model.file_names_.emplace_back(kSingleName);
  } else {
    return NoModel(directory);
  }
  for (const std::string& name : model.file_names_) {
    const std::string path = directory + "/" + name;
    if (!PathExists(path)) {
      return DataError("ST-PATH", index_path + ": names " + Printable(name) +
                                      ", which is not here; fetch the folder again");
    }
    SALA_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(path));
    for (const SafetensorsEntry& entry : file.entries()) {
      const auto listed = index.weight_map.find(entry.name);
      if (sharded && (listed == index.weight_map.end() || listed->second != name)) {
        return DataError("ST-PATH",
                         path + ": holds tensor `" + Printable(entry.name) +
                             "`, which the index does not place there; fetch the folder again");
      }
      model.where_[entry.name] = {model.files_.size(), entry};
    }
    model.files_.push_back(std::move(file));
  }
  for (const auto& [tensor, file] : index.weight_map) {
    if (model.where_.count(tensor) == 0) {
      return DataError("ST-PATH", index_path + ": tensor `" + Printable(tensor) + "` is not in " +
                                      Printable(file) + "; fetch the folder again");
    }
  }
  SALA_RETURN_IF_ERROR(CheckTotalSize(index, model.files_, index_path));
  return model;
}

std::vector<std::string> SafetensorsModel::names() const {
  std::vector<std::string> names;
  for (const auto& [name, place] : where_) names.push_back(name);
  return names;
}

const SafetensorsEntry* SafetensorsModel::Find(const std::string& name) const {
  const auto at = where_.find(name);
  return at == where_.end() ? nullptr : &at->second.second;
}

Status SafetensorsModel::ReadF32(const std::string& name, const std::vector<int64_t>& shape,
                                 float* out) const {
  int64_t n = 1;
  for (const int64_t d : shape) n *= d;
  return ReadBoxF32(name, shape, {}, shape, 0, n, out);
}

Status SafetensorsModel::ReadBoxF32(const std::string& name, const std::vector<int64_t>& shape,
                                    const std::vector<int64_t>& offset,
                                    const std::vector<int64_t>& box, int64_t begin, int64_t end,
                                    float* out) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr)
    return DataError("ST-SHAPE", "tensor `" + Printable(name) + "` is not in the model");
  if (entry->shape != shape) {
    return DataError("ST-SHAPE", "tensor `" + Printable(name) + "` has shape " +
                                     ShapeText(entry->shape) + ", expected " + ShapeText(shape));
  }
  const char* from = Data(name);
  const int64_t item = SafetensorsElementBytes(entry->dtype);
  // A box as wide as the tensor lies in a row; otherwise row by row.
  const bool rows = shape.size() == 2 && box[1] != shape[1];
  SALA_CHECK(rows || shape.size() <= 2 || box == shape) << "box of " << name;
  const int64_t width = rows ? box[1] : std::max<int64_t>(end, 1);
  const int64_t stride = rows ? shape[1] : 0;
  int64_t first = 0;
  if (!offset.empty()) {
    first = offset[0];
    if (shape.size() == 2) first = first * shape[1] + offset[1];
  }
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / width;
    const int64_t n = std::min(end, (row + 1) * width) - at;
    const int64_t element = first + row * stride + at % width;
    if (!ConvertToF32(entry->dtype, from + element * item, n, out + (at - begin))) {
      return DataError("ST-DTYPE", "tensor `" + Printable(name) + "` is " + entry->dtype +
                                       ", expected F32, BF16, F16 or F64; convert the weights");
    }
    at += n;
  }
  return OkStatus();
}

StatusOr<std::string> SafetensorsModel::RawBytes(const std::string& name) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr)
    return DataError("ST-SHAPE", "tensor `" + Printable(name) + "` is not in the model");
  return std::string(Data(name), static_cast<size_t>(entry->bytes));
}

const char* SafetensorsModel::Data(const std::string& name) const {
  const auto at = where_.find(name);
  return at == where_.end() ? nullptr : files_[at->second.first].Data(at->second.second);
}

Status WriteSafetensorsModel(const std::string& directory,
                             const std::vector<SafetensorsTensor>& tensors,
                             int64_t max_shard_bytes) {
  const auto shards = CutIntoShards(tensors, max_shard_bytes);
  if (shards.size() == 1) {
    return WriteSafetensors(directory + "/" + SafetensorsModel::kSingleName, shards[0], {});
  }
  int64_t total = 0;
  json weight_map = json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    std::array<char, 64> name{};
    std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", i + 1,
                  shards.size());
    SALA_RETURN_IF_ERROR(WriteSafetensors(directory + "/" + name.data(), shards[i], {}));
    for (const SafetensorsTensor& tensor : shards[i]) {
      weight_map[tensor.name] = name.data();
      total += BytesOf(tensor);
    }
  }
  const json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  return WriteFileAtomically(directory + "/" + SafetensorsModel::kIndexName, index.dump(2) + "\n");
}

}  // namespace sala
