// Names, tables and geometry shared by the checkpoint_*.cc files; not for other rooms.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/checkpoint.h"

namespace sala::checkpoint {

constexpr int64_t kVersion = 1;
constexpr int kMaxShapeRank = 4;
constexpr int64_t kMaxSliceBytes = int64_t{64} << 20;
constexpr int64_t kAlignDatasetsFrom =
    4096;  // these files are read with pread, small datasets need no alignment
constexpr char kManifestName[] = "manifest.json";
constexpr char kIndexName[] = "index.h5";
constexpr char kConfigName[] = "config.yaml";
constexpr char kTemporaryPrefix[] = ".tmp-step-";
constexpr char kDeletedPrefix[] = ".del-step-";

std::string StepName(int64_t global_step);  // "step-000000012"

// The tables of index.h5.
struct Index {
  std::vector<StoredTensor> tensors;
  std::vector<StoredSlice> slices;
};

Status WriteIndex(const std::string& path, const std::string& save_id, const Index& index);
// Checks every number before it is used; `file_bytes` gives the size of a data file, -1 for an
// unknown name.
StatusOr<Index> ReadIndex(const std::string& path,
                          const std::function<int64_t(const std::string&)>& file_bytes);

// Number of elements, or -1 when it does not fit in 63 bits or a dimension is negative.
int64_t CheckedElements(const std::vector<int64_t>& shape);

// A run of neighbouring elements of a tensor inside a slice.
struct Run {
  int64_t tensor_begin = 0;  // row-major index in the tensor
  int64_t slice_begin = 0;   // index in the slice
  int64_t count = 0;
};
void ForEachRun(const std::vector<int64_t>& shape, const StoredSlice& slice,
                const std::function<void(const Run&)>& body);

// CKPT-COVER unless `slices` cover [begin, end) of the tensor exactly once.
Status CheckCover(const StoredTensor& tensor, const StoredSlice* first, const StoredSlice* last,
                  int64_t begin, int64_t end);

// CRC32C of the first `bytes` of a file, read in pieces: mapped, the whole file would count as
// memory of the process.
StatusOr<uint32_t> FileCrc(const std::string& path, int64_t bytes);

// Ends the process when the environment asks for it; see core/checkpoint.h.
void FaultPoint(const char* point);

// `text` of the manifest with its own CRC filled in, and the check of it.
std::string SealManifest(nlohmann::ordered_json manifest);
bool ManifestIsIntact(const std::string& text);

}  // namespace sala::checkpoint
