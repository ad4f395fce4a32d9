// safetensors files: reader with every check of the format before any value is used, writer with
// fixed order. Format and errors (ST-*, exit 65): docs/formats.md.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/file.h"
#include "core/status.h"

namespace sala {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as written: "BF16", "F32", ...
  std::vector<int64_t> shape;
  int64_t begin = 0;  // offset in the file
  int64_t bytes = 0;
};

class SafetensorsFile {
 public:
  static StatusOr<SafetensorsFile> Open(const std::string& path);
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const SafetensorsEntry* Find(const std::string& name) const;
  const char* Data(const SafetensorsEntry& entry) const { return file_.data() + entry.begin; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  MappedFile file_;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

struct SafetensorsTensor {
  std::string name;
  DType dtype = DType::kBF16;
  std::vector<int64_t> shape;
  const void* data = nullptr;
};

Status WriteSafetensors(const std::string& path, std::vector<SafetensorsTensor> tensors,
                        const std::map<std::string, std::string>& metadata);

// A Hugging Face model folder: model.safetensors, or model-0000i-of-0000n.safetensors with
// model.safetensors.index.json.
class SafetensorsModel {
 public:
  static StatusOr<SafetensorsModel> Open(const std::string& directory);
  std::vector<std::string> names() const;
  const SafetensorsEntry* Find(const std::string& name) const;
  // The tensor as float32 (from F32, BF16, F16, F64); wrong shape is ST-SHAPE.
  Status ReadF32(const std::string& name, const std::vector<int64_t>& shape, float* out) const;
  StatusOr<std::string> RawBytes(const std::string& name) const;

 private:
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::pair<size_t, SafetensorsEntry>> where_;
};

// Splits into files of at most max_shard_bytes and writes the index when more than one is needed.
Status WriteSafetensorsModel(const std::string& directory,
                             const std::vector<SafetensorsTensor>& tensors,
                             int64_t max_shard_bytes = int64_t{5} * 1000 * 1000 * 1000);

}  // namespace sala
