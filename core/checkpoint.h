// The checkpoint format: a directory of slices of named global tensors, valid only with its
// manifest, which is written last. Layout, schemas and faults: docs/formats.md. This room knows the
// format, not ranks or stages: recipes/ decides when to save and who owns which slice.
//
// Saving (a writer per rank, all sharing one directory):
//   rank 0: commit = CheckpointCommit::Begin(root, step, bytes)        makes .tmp-step-000000012-1/
//   each:   WriteCheckpointSlices(dir, writer, save_id, slices)        its WrittenSlices go to rank
//   0 rank 0: commit.Finish(info, all WrittenSlices, config_yaml)        renames to step-000000012/
//   On any failure rank 0 calls commit.Abandon(); earlier checkpoints are not touched.
// Loading: Checkpoint::Open(dir) checks manifest, sizes, save ids and index; ReadF32 reads any
// range of any tensor, whatever the slices on disk, with pread only, and verifies the CRC of every
// slice it touches in full.
//
// Files: manifest.json (JSON, its last key self_crc32c covers its own bytes with the eight digits
// as zeros), index.h5 (columns), config.yaml, model-WRITER.h5 (param, buffer) and optim-WRITER.h5
// (master, exp_avg, exp_avg_sq) with one dataset KIND/TENSOR#N of at most 64 MiB per slice.
//
// Tests of crashes: with the environment variable SALA_FAULT=checkpoint:POINT the process ends by
// _exit(137), as if killed, at POINT: after-slices (a writer's files are written), before-manifest,
// after-manifest (renamed into place), before-rename (all fsynced, still under its .tmp- name).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"
#include "nlohmann/json.hpp"

namespace sala {

enum class TensorKind : uint8_t { kParam, kMaster, kExpAvg, kExpAvgSq, kBuffer };
std::string_view NameOf(TensorKind kind);  // "param", "master", "exp_avg", "exp_avg_sq", "buffer"

// A part of a named global tensor: elements [flat_begin, flat_end) of the whole tensor in row-major
// order. A box is the part of a tensor parallel rank, a flat range of it that of a ZeRO shard.
struct TensorSlice {
  std::string name;
  TensorKind kind = TensorKind::kParam;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape = {};       // of the global tensor
  std::vector<int64_t> box_offset = {};  // empty: whole tensor
  std::vector<int64_t> box_shape = {};   // empty: whole tensor
  int64_t flat_begin = 0;                // range in row-major order of the box
  int64_t flat_end = -1;                 // -1: to the end of the box
  const void* data = nullptr;            // elements flat_begin .. flat_end
};

// What one writer wrote; json.dump() and parse() carry it to rank 0.
struct WrittenSlices {
  nlohmann::json json;  // files with bytes and crc, slices with offsets and crc
};

// Writes and fsyncs this writer's files. `slices` of rank 0 to 4. CKPT-SAVE (74).
StatusOr<WrittenSlices> WriteCheckpointSlices(const std::string& directory, int writer,
                                              const std::string& save_id,
                                              const std::vector<TensorSlice>& slices);

struct CheckpointInfo {  // the manifest's content that is not derived from the files
  std::string save_id;   // filled by Begin
  int64_t global_step = 0;
  nlohmann::json stage;     // {name, index, step, final}
  nlohmann::json program;   // {version, ...}
  nlohmann::json topology;  // {world, dp, tp, cp, zero_stage}
  nlohmann::json model;     // {config_sha256, parameters, tensors, mixer_types}
  std::string tokenizer_fingerprint;
  nlohmann::json trainer;  // counters, cursor, HALO state
  nlohmann::json parent;   // {path, save_id} or null
};

class CheckpointCommit {
 public:
  // Makes the temporary directory. CKPT-SAVE (74) when it cannot; CKPT-SPACE (74) when the file
  // system has less than 1.1 * bytes_needed free.
  static StatusOr<CheckpointCommit> Begin(const std::string& root, int64_t global_step,
                                          int64_t bytes_needed);
  const std::string& directory() const { return directory_; }
  const std::string& save_id() const { return save_id_; }
  // index.h5, config.yaml, extra files, manifest.json, fsyncs, rename. Returns the final directory.
  StatusOr<std::string> Finish(
      CheckpointInfo info, const std::vector<WrittenSlices>& written,
      const std::string& config_yaml,
      const std::vector<std::pair<std::string, std::string>>& extra_files = {});
  void Abandon();  // renames to .del-* and removes

 private:
  std::string root_;
  std::string directory_;
  std::string save_id_;
  int64_t global_step_ = 0;
};

// Quick: manifest, presence and sizes of files, save ids, index. Full: every CRC too. Deep: also
// every tensor covered exactly once (CKPT-COVER) and no NaN or Inf (CKPT-TENSOR).
enum class VerifyLevel { kQuick, kFull, kDeep };

struct StoredTensor {
  std::string name;
  TensorKind kind = TensorKind::kParam;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;

  int64_t numel() const;  // of a tensor of an open checkpoint, whose shape was checked
};

// One dataset of a data file: elements [flat_begin, flat_end) of a box of a tensor.
struct StoredSlice {
  size_t tensor = 0;
  std::string file;
  std::vector<int64_t> box_offset, box_shape;  // of the tensor's rank
  int64_t flat_begin = 0, flat_end = 0;
  int64_t byte_offset = 0, bytes = 0;
  uint32_t crc = 0;
};

class Checkpoint {
 public:
  // CKPT-NONE (no such directory or no manifest), CKPT-MANIFEST, CKPT-VERSION, CKPT-SIZE,
  // CKPT-MIXED, CKPT-CRC.
  static StatusOr<Checkpoint> Open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  const CheckpointInfo& info() const { return info_; }
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  const StoredTensor* Find(const std::string& name, TensorKind kind) const;

  // Elements [begin, end) in row-major order of the global tensor, converted to float32.
  // CKPT-TENSOR, CKPT-CRC, CKPT-COVER.
  Status ReadF32(const std::string& name, TensorKind kind, int64_t begin, int64_t end,
                 float* out) const;

  // Elements [begin, end) in row-major order of the box at `offset` of shape `box` (tensors of one
  // or two dimensions), converted to float32.
  Status ReadBoxF32(const std::string& name, TensorKind kind, const std::vector<int64_t>& offset,
                    const std::vector<int64_t>& box, int64_t begin, int64_t end, float* out) const;

  // The same range as stored: (end - begin) * SizeOf(dtype) bytes.
  Status ReadRaw(const StoredTensor& tensor, int64_t begin, int64_t end, void* out) const;

  StatusOr<std::string> ReadConfig() const;                        // config.yaml
  StatusOr<std::string> ReadExtra(const std::string& name) const;  // any text file, CRC checked
  Status Verify(VerifyLevel level) const;  // the first problem, named by file, tensor and slice

 private:
  // Elements [begin, end) of a tensor, wanted at `out` of the result.
  struct Wanted {
    int64_t begin = 0, end = 0, out = 0;
  };
  // `wanted` in rising order. Every slice that is touched is read and checked once.
  Status ReadRanges(const StoredTensor& tensor, const std::vector<Wanted>& wanted, void* out) const;
  Status ReadRangesF32(const std::string& name, TensorKind kind, const std::vector<Wanted>& wanted,
                       float* out) const;
  std::pair<size_t, size_t> SlicesOf(size_t tensor) const;  // range in slices_
  Status CheckFiles() const;
  Status ReadSlice(const StoredSlice& slice, std::vector<char>* bytes) const;
  Status CheckSlice(const StoredSlice& slice, bool finite) const;
  std::string Describe(const StoredSlice& slice) const;

  std::string directory_;
  CheckpointInfo info_;
  nlohmann::json manifest_;
  std::vector<StoredTensor> tensors_;  // by name, then kind
  std::vector<StoredSlice> slices_;    // by tensor
};

struct CheckpointListing {
  std::string directory;
  int64_t global_step = 0;
  bool stage_final = false;
  std::string stage;
};

// Complete-looking checkpoints below root (valid manifest), oldest first. Other names are ignored.
std::vector<CheckpointListing> ListCheckpoints(const std::string& root);

// The newest checkpoint that opens and passes `level`; older ones are tried when it does not, with
// a warning each. CKPT-NONE when there is none at all; nullopt is returned for an empty root.
StatusOr<std::optional<Checkpoint>> NewestValidCheckpoint(const std::string& root,
                                                          VerifyLevel level);

// Removes all but the newest `keep_last`, stage-final ones, `protect`ed paths and directories that
// hold a file KEEP; also left-over .tmp-step-* and .del-step-* (so not while a save is in flight).
Status PruneCheckpoints(const std::string& root, int64_t keep_last,
                        const std::vector<std::string>& protect);
Status RemoveLeftovers(const std::string& root);

struct TensorDifference {
  std::string name;
  TensorKind kind = TensorKind::kParam;
  bool equal = false;  // same bits
  std::string note;    // "only in A", "shape differs: ..." or ""
  double max_abs = 0;
  double rms = 0;
  double relative = 0;  // rms over the root mean square of A
};
StatusOr<std::vector<TensorDifference>> DiffCheckpoints(const Checkpoint& a, const Checkpoint& b);

}  // namespace sala
