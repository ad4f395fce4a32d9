// safetensors files: reader with every check of the format before any value is used, writer with
// fixed order. Format and errors (ST-*, exit 65): docs/formats.md.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
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
  std::string_view HeaderText() const;  // the JSON with its padding
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
  const void* data = nullptr;  // null: zeros, as a hole of the file, which takes no space on disk
  std::string type = {};       // as written, where it is not the dtype's own name: "F16" of kU16
};

Status WriteSafetensors(const std::string& path, std::vector<SafetensorsTensor> tensors,
                        const std::map<std::string, std::string>& metadata);

// With a header as another program wrote it. `tensors` has at least those it names, with the types
// and shapes it gives them; others are left out.
Status WriteSafetensorsAs(const std::string& path, const std::string& header,
                          const std::vector<SafetensorsTensor>& tensors);

// A name that an index may give a file of weights: NAME.safetensors, without a directory.
bool IsWeightsFileName(const std::string& name);

// A Hugging Face model folder: model.safetensors, or model-0000i-of-0000n.safetensors with
// model.safetensors.index.json.
class SafetensorsModel {
 public:
  static constexpr char kSingleName[] = "model.safetensors";
  static constexpr char kIndexName[] = "model.safetensors.index.json";

  // ST-FORMAT (65) where the weights are of a form that is not read (pickles, GGUF), FILE-MISSING
  // (66) where there are none.
  static StatusOr<SafetensorsModel> Open(const std::string& directory);
  std::vector<std::string> names() const;
  const SafetensorsEntry* Find(const std::string& name) const;
  // The tensor as float32 (from F32, BF16, F16, F64, the last rounded to nearest); wrong shape is
  // ST-SHAPE.
  Status ReadF32(const std::string& name, const std::vector<int64_t>& shape, float* out) const;
  // Elements [begin, end) in row-major order of the box at `offset` of shape `box` (tensors of one
  // or two dimensions). Pages of the file outside it are not touched.
  Status ReadBoxF32(const std::string& name, const std::vector<int64_t>& shape,
                    const std::vector<int64_t>& offset, const std::vector<int64_t>& box,
                    int64_t begin, int64_t end, float* out) const;
  StatusOr<std::string> RawBytes(const std::string& name) const;
  const char* Data(const std::string& name) const;  // null: no such tensor

  // The files in the order of their names, and the index ("" where there is none).
  const std::vector<std::string>& file_names() const { return file_names_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }
  const std::string& index_text() const { return index_text_; }

 private:
  std::vector<std::string> file_names_;
  std::vector<SafetensorsFile> files_;
  std::string index_text_;
  std::map<std::string, std::pair<size_t, SafetensorsEntry>> where_;
};

inline constexpr int64_t kMaxShardBytes = int64_t{5} * 1000 * 1000 * 1000;

// Splits into files of at most max_shard_bytes, in the given order, and writes the index when more
// than one is needed. A larger tensor has a file of its own.
Status WriteSafetensorsModel(const std::string& directory,
                             const std::vector<SafetensorsTensor>& tensors,
                             int64_t max_shard_bytes = kMaxShardBytes);

}  // namespace sala
