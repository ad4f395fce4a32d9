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
#include <system_error>
#include <tuple>

#include "core/check.h"
#include "core/safetensors_header.h"
#include "nlohmann/json.hpp"

namespace sala {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr char kSingleName[] = "model.safetensors";
constexpr char kIndexName[] = "model.safetensors.index.json";

Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

// The name the format gives our number type.
std::string FormatName(DType dtype) {
  std::string name(NameOf(dtype));
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

// IEEE binary16: sign, 5 exponent bits (bias 15), 10 mantissa bits.
float HalfToFloat(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  if (exponent == 31)
    return std::bit_cast<float>(sign | 0x7f800000U | static_cast<uint32_t>(mantissa) << 13);
  // Subnormals have exponent 1 and no leading one.
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                   : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(size));
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

bool IsPlainName(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string("/\\\0", 3)) == std::string::npos;
}

// File of each tensor, from the index; every value is checked before use.
StatusOr<std::map<std::string, std::string>> ReadWeightMap(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    return DataError("ST-JSON", path + ": not a JSON object with a weight_map");
  }
  std::map<std::string, std::string> weight_map;
  for (const auto& [tensor, file] : root["weight_map"].items()) {
    if (!file.is_string() || !IsPlainName(file.get<std::string>())) {
      return DataError("ST-PATH", path + ": tensor `" + Printable(tensor) +
                                      "`: " + Printable(file.dump()) +
                                      " is not a plain file name inside the folder");
    }
    weight_map[tensor] = file.get<std::string>();
  }
  return weight_map;
}

Status NoModel(const std::string& directory) {
  const StatusOr<std::vector<std::string>> names = ListDirectory(directory);
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    if (name.rfind("pytorch_model", 0) == 0) {
      return DataError("ST-PATH", directory + ": found " + Printable(name) +
                                      ", a pickle file: loading one runs code from it, so it is "
                                      "not read; convert the model to safetensors");
    }
  }
  return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                   directory + ": neither " + kSingleName + " nor " + kIndexName + " is here");
}

}  // namespace

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

const SafetensorsEntry* SafetensorsFile::Find(const std::string& name) const {
  for (const SafetensorsEntry& entry : entries_) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

Status WriteSafetensors(const std::string& path, std::vector<SafetensorsTensor> tensors,
                        const std::map<std::string, std::string>& metadata) {
  // Falling alignment keeps every tensor aligned to its own element size.
  std::sort(tensors.begin(), tensors.end(),
            [](const SafetensorsTensor& a, const SafetensorsTensor& b) {
              return std::make_tuple(-static_cast<int64_t>(SizeOf(a.dtype)), std::cref(a.name)) <
                     std::make_tuple(-static_cast<int64_t>(SizeOf(b.dtype)), std::cref(b.name));
            });
  ordered_json header = {{"__metadata__", metadata}};
  header["__metadata__"]["format"] = "pt";
  int64_t at = 0;
  for (const SafetensorsTensor& tensor : tensors) {
    SALA_CHECK(!header.contains(tensor.name)) << "tensor " << tensor.name << " is given twice";
    const int64_t bytes = BytesOf(tensor);
    header[tensor.name] = {{"dtype", FormatName(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {at, at + bytes}}};
    at += bytes;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t length = text.size();
  std::array<char, 8> prefix{};
  std::memcpy(prefix.data(), &length, prefix.size());

  const std::string temporary = path + ".tmp";
  OutputFile file(temporary);
  file.Append(prefix.data(), prefix.size());
  file.Append(text.data(), text.size());
  for (const SafetensorsTensor& tensor : tensors) {
    file.Append(static_cast<const char*>(tensor.data), static_cast<size_t>(BytesOf(tensor)));
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

StatusOr<SafetensorsModel> SafetensorsModel::Open(const std::string& directory) {
  SafetensorsModel model;
  const std::string index_path = directory + "/" + kIndexName;
  std::map<std::string, std::string> weight_map;
  std::vector<std::string> names;
  if (PathExists(index_path)) {
    SALA_ASSIGN_OR_RETURN(weight_map, ReadWeightMap(index_path));
    for (const auto& [tensor, file] : weight_map) names.push_back(file);
    std::sort(names.begin(), names.end());
    names.erase(std::unique(names.begin(), names.end()), names.end());
  } else if (PathExists(directory + "/" + kSingleName)) {
    names.emplace_back(kSingleName);
  } else {
    return NoModel(directory);
  }
  for (const std::string& name : names) {
    SALA_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(directory + "/" + name));
    for (const SafetensorsEntry& entry : file.entries()) {
      const auto listed = weight_map.find(entry.name);
      if (!weight_map.empty() && (listed == weight_map.end() || listed->second != name)) {
        return DataError("ST-PATH", directory + "/" + name + ": holds tensor `" +
                                        Printable(entry.name) +
                                        "`, which the index does not place there");
      }
      model.where_[entry.name] = {model.files_.size(), entry};
    }
    model.files_.push_back(std::move(file));
  }
  for (const auto& [tensor, file] : weight_map) {
    if (model.where_.count(tensor) == 0) {
      return DataError("ST-PATH", index_path + ": tensor `" + Printable(tensor) + "` is not in " +
                                      Printable(file));
    }
  }
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
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr)
    return DataError("ST-SHAPE", "tensor `" + Printable(name) + "` is not in the model");
  if (entry->shape != shape) {
    return DataError("ST-SHAPE", "tensor `" + Printable(name) + "` has shape " +
                                     ShapeText(entry->shape) + ", expected " + ShapeText(shape));
  }
  const char* from = files_[where_.at(name).first].Data(*entry);
  const int64_t n = entry->bytes / SafetensorsElementBytes(entry->dtype);
  if (entry->dtype == "F32") {
    ConvertAll<float>(from, n, out, [](float x) { return x; });
  } else if (entry->dtype == "BF16") {
    ConvertAll<BF16>(from, n, out, [](BF16 x) { return static_cast<float>(x); });
  } else if (entry->dtype == "F16") {
    ConvertAll<uint16_t>(from, n, out, HalfToFloat);
  } else if (entry->dtype == "F64") {
    ConvertAll<double>(from, n, out, [](double x) { return static_cast<float>(x); });
  } else {
    return DataError("ST-DTYPE", "tensor `" + Printable(name) + "` is " + entry->dtype +
                                     ", expected F32, BF16, F16 or F64");
  }
  return OkStatus();
}

StatusOr<std::string> SafetensorsModel::RawBytes(const std::string& name) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr)
    return DataError("ST-SHAPE", "tensor `" + Printable(name) + "` is not in the model");
  return std::string(files_[where_.at(name).first].Data(*entry), static_cast<size_t>(entry->bytes));
}

Status WriteSafetensorsModel(const std::string& directory,
                             const std::vector<SafetensorsTensor>& tensors,
                             int64_t max_shard_bytes) {
  // In the given order, a new file where the next tensor would not fit; a tensor larger than the
  // limit gets its own.
  std::vector<std::vector<SafetensorsTensor>> shards(1);
  int64_t shard_bytes = 0;
  int64_t total = 0;
  for (const SafetensorsTensor& tensor : tensors) {
    const int64_t bytes = BytesOf(tensor);
    if (!shards.back().empty() && shard_bytes + bytes > max_shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shards.back().push_back(tensor);
    shard_bytes += bytes;
    total += bytes;
  }
  if (shards.size() == 1) return WriteSafetensors(directory + "/" + kSingleName, shards[0], {});
  ordered_json weight_map = ordered_json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    std::array<char, 64> name{};
    std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", i + 1,
                  shards.size());
    SALA_RETURN_IF_ERROR(WriteSafetensors(directory + "/" + name.data(), shards[i], {}));
    for (const SafetensorsTensor& tensor : shards[i]) weight_map[tensor.name] = name.data();
  }
  const ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  return WriteFileAtomically(directory + "/" + kIndexName, index.dump(2) + "\n");
}

}  // namespace sala
