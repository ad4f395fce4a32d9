#include <sys/random.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <map>
#include <system_error>

#include "core/check.h"
#include "core/checkpoint.h"
#include "core/checkpoint_format.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/hdf5.h"

namespace sala {
namespace {

using checkpoint::FaultPoint;
using nlohmann::json;
using nlohmann::ordered_json;

// Any failure while saving is CKPT-SAVE; the text says what failed.
Status SaveError(const Status& status) {
  return status.ok() ? status
                     : MakeError(ExitCode::kIo, "CKPT-SAVE",
                                 "cannot save the checkpoint: " + MessageOf(status));
}

bool IsOptimizerState(TensorKind kind) {
  return kind == TensorKind::kMaster || kind == TensorKind::kExpAvg ||
         kind == TensorKind::kExpAvgSq;
}

StatusOr<json> FileRecord(const std::string& directory, const std::string& name) {
  const std::string path = directory + "/" + name;
  SALA_ASSIGN_OR_RETURN(const int64_t bytes, FileSize(path));
  SALA_ASSIGN_OR_RETURN(const uint32_t crc, checkpoint::FileCrc(path, bytes));
  return json{{"name", name}, {"bytes", bytes}, {"crc32c", Hex32(crc)}};
}

// The slice with its defaults filled in.
TensorSlice Completed(const TensorSlice& given) {
  TensorSlice slice = given;
  if (slice.box_shape.empty()) slice.box_shape = slice.shape;
  if (slice.box_offset.empty()) slice.box_offset.assign(slice.shape.size(), 0);
  if (slice.flat_end < 0) slice.flat_end = checkpoint::CheckedElements(slice.box_shape);
  SALA_CHECK(slice.shape.size() <= checkpoint::kMaxShapeRank &&
             slice.box_shape.size() == slice.shape.size() &&
             slice.box_offset.size() == slice.shape.size() && slice.flat_begin <= slice.flat_end)
      << "slice of " << slice.name;
  SALA_CHECK(!slice.name.empty() && slice.name.find_first_of("/\n") == std::string::npos)
      << "name " << slice.name;
  return slice;
}

// Writes one file of this writer.
class SliceFile {
 public:
  static StatusOr<SliceFile> Create(const std::string& directory, const std::string& name,
                                    int writer, const std::string& save_id) {
    SALA_ASSIGN_OR_RETURN(Hdf5Writer file, Hdf5Writer::Create(directory + "/" + name,
                                                              checkpoint::kAlignDatasetsFrom));
    // Attributes come before all data, so that the save id stands near the start of the file.
    SALA_RETURN_IF_ERROR(file.WriteAttribute("format", "checkpoint-data"));
    SALA_RETURN_IF_ERROR(file.WriteAttribute("version", checkpoint::kVersion));
    SALA_RETURN_IF_ERROR(file.WriteAttribute("save_id", save_id));
    SALA_RETURN_IF_ERROR(file.WriteAttribute("writer", int64_t{writer}));
    return SliceFile(std::move(file), name);
  }

  // Cuts the slice in pieces of at most 64 MiB, each with its own CRC, and appends their records to
  // `records`.
  Status Add(const TensorSlice& slice, json* records) {
    const auto size = static_cast<int64_t>(SizeOf(slice.dtype));
    const int64_t most = checkpoint::kMaxSliceBytes / size;
    const std::string tensor = std::string(NameOf(slice.kind)) + "/" + slice.name;
    for (int64_t a = slice.flat_begin; a < slice.flat_end; a += most) {
      const int64_t b = std::min(slice.flat_end, a + most);
      const char* data = static_cast<const char*>(slice.data) + (a - slice.flat_begin) * size;
      const std::string dataset = tensor + "#" + std::to_string(pieces_[tensor]++);
      SALA_RETURN_IF_ERROR(file_.WriteDataset(dataset, Hdf5TypeOf(slice.dtype), {b - a}, data));
      SALA_ASSIGN_OR_RETURN(const int64_t offset, file_.Offset(dataset));
      records->push_back({{"tensor", slice.name},
                          {"kind", slice.kind},
                          {"dtype", slice.dtype},
                          {"shape", slice.shape},
                          {"box_offset", slice.box_offset},
                          {"box_shape", slice.box_shape},
                          {"flat", {a, b}},
                          {"file", name_},
                          {"byte_offset", offset},
                          {"bytes", (b - a) * size},
                          {"crc32c", Crc32c(data, static_cast<size_t>((b - a) * size))}});
    }
    return OkStatus();
  }

  Status Close() { return file_.Close(); }

 private:
  SliceFile(Hdf5Writer file, std::string name) : file_(std::move(file)), name_(std::move(name)) {}

  Hdf5Writer file_;
  std::string name_;
  std::map<std::string, int> pieces_;
};

StatusOr<WrittenSlices> WriteFiles(const std::string& directory, int writer,
                                   const std::string& save_id,
                                   const std::vector<TensorSlice>& slices) {
  WrittenSlices written;
  written.json = {{"files", json::array()}, {"slices", json::array()}};
  for (const bool optimizer : {false, true}) {
    std::array<char, 32> name{};
    std::snprintf(name.data(), name.size(), "%s-%05d.h5", optimizer ? "optim" : "model", writer);
    const auto belongs = [&](const TensorSlice& slice) {
      return IsOptimizerState(slice.kind) == optimizer;
    };
    if (std::none_of(slices.begin(), slices.end(), belongs)) continue;
    SALA_ASSIGN_OR_RETURN(SliceFile file,
                          SliceFile::Create(directory, name.data(), writer, save_id));
    for (const TensorSlice& slice : slices) {
      if (belongs(slice)) SALA_RETURN_IF_ERROR(file.Add(Completed(slice), &written.json["slices"]));
    }
    SALA_RETURN_IF_ERROR(file.Close());
    SALA_ASSIGN_OR_RETURN(const json record, FileRecord(directory, name.data()));
    written.json["files"].push_back(record);
  }
  return written;
}

// The index of all writers: tensors sorted by name and kind, slices by tensor.
StatusOr<checkpoint::Index> MergeIndex(const std::vector<WrittenSlices>& written) {
  std::map<std::pair<std::string, TensorKind>, size_t> ids;
  for (const WrittenSlices& part : written) {
    for (const json& s : part.json["slices"]) {
      ids[{s["tensor"].get<std::string>(), s["kind"].get<TensorKind>()}] = 0;
    }
  }
  checkpoint::Index index;
  for (auto& [key, id] : ids) {
    id = index.tensors.size();
    index.tensors.push_back({key.first, key.second, DType::kF32, {-1}});
  }
  for (const WrittenSlices& part : written) {
    for (const json& s : part.json["slices"]) {
      const size_t id = ids.at({s["tensor"].get<std::string>(), s["kind"].get<TensorKind>()});
      StoredTensor& tensor = index.tensors[id];
      const auto dtype = s["dtype"].get<DType>();
      const auto shape = s["shape"].get<std::vector<int64_t>>();
      SALA_CHECK(tensor.shape == std::vector<int64_t>{-1} ||
                 (tensor.dtype == dtype && tensor.shape == shape))
          << "writers disagree about tensor " << tensor.name;
      tensor.dtype = dtype;
      tensor.shape = shape;
      index.slices.push_back({id, s["file"], s["box_offset"], s["box_shape"], s["flat"][0],
                              s["flat"][1], s["byte_offset"], s["bytes"], s["crc32c"]});
    }
  }
  std::stable_sort(index.slices.begin(), index.slices.end(),
                   [](const StoredSlice& a, const StoredSlice& b) { return a.tensor < b.tensor; });
  for (size_t t = 0, at = 0; t < index.tensors.size(); ++t) {
    const size_t first = at;
    while (at < index.slices.size() && index.slices[at].tensor == t) ++at;
    SALA_RETURN_IF_ERROR(checkpoint::CheckCover(
        index.tensors[t], index.slices.data() + first, index.slices.data() + at, 0,
        checkpoint::CheckedElements(index.tensors[t].shape)));
  }
  return index;
}

std::string TimeNow() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text.data();
}

// A random UUID (RFC 4122, version 4). Names a save, decides nothing: it need not be reproducible.
StatusOr<std::string> NewSaveId() {
  std::array<uint8_t, 16> bytes{};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return MakeError(ExitCode::kIo, "CKPT-SAVE", "cannot get random bytes for the save id");
  }
  bytes[6] = static_cast<uint8_t>((bytes[6] & 0x0FU) | 0x40U);
  bytes[8] = static_cast<uint8_t>((bytes[8] & 0x3FU) | 0x80U);
  std::string text;
  for (size_t i = 0; i < bytes.size(); ++i) {
    static constexpr char kDigits[] = "0123456789abcdef";
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

ordered_json MakeManifest(const CheckpointInfo& info, const json& files,
                          const checkpoint::Index& index) {
  json contents = json::array({"model"});
  const auto is_optimizer = [](const StoredTensor& t) { return IsOptimizerState(t.kind); };
  if (std::any_of(index.tensors.begin(), index.tensors.end(), is_optimizer))
    contents.push_back("optimizer");
  contents.push_back("trainer");
  return {{"format", "checkpoint"},  {"version", checkpoint::kVersion},
          {"save_id", info.save_id}, {"global_step", info.global_step},
          {"stage", info.stage},     {"created", TimeNow()},
          {"program", info.program}, {"topology", info.topology},
          {"model", info.model},     {"tokenizer_fingerprint", info.tokenizer_fingerprint},
          {"contents", contents},    {"files", files},
          {"trainer", info.trainer}, {"parent", info.parent}};
}

}  // namespace

StatusOr<WrittenSlices> WriteCheckpointSlices(const std::string& directory, int writer,
                                              const std::string& save_id,
                                              const std::vector<TensorSlice>& slices) {
  StatusOr<WrittenSlices> written = WriteFiles(directory, writer, save_id, slices);
  if (!written.ok()) return SaveError(written.status());
  FaultPoint("after-slices");
  return written;
}

StatusOr<CheckpointCommit> CheckpointCommit::Begin(const std::string& root, int64_t global_step,
                                                   int64_t bytes_needed) {
  SALA_RETURN_IF_ERROR(SaveError(MakeDirectories(root)));
  const StatusOr<int64_t> free_bytes = FreeBytes(root);
  if (!free_bytes.ok()) return SaveError(free_bytes.status());
  const double wanted =
      1.1 * static_cast<double>(bytes_needed);  // headers, index, rounding to blocks
  if (static_cast<double>(*free_bytes) < wanted) {
    return MakeError(ExitCode::kIo, "CKPT-SPACE",
                     root + ": the file system has " + std::to_string(*free_bytes) +
                         " bytes free, a checkpoint needs " +
                         std::to_string(static_cast<int64_t>(wanted)) +
                         "; free space or lower keep_last");
  }
  CheckpointCommit commit;
  SALA_ASSIGN_OR_RETURN(commit.save_id_, NewSaveId());
  commit.root_ = root;
  commit.global_step_ = global_step;
  for (int attempt = 1; commit.directory_.empty(); ++attempt) {
    const std::string path =
        root + "/.tmp-" + checkpoint::StepName(global_step) + "-" + std::to_string(attempt);
    if (::mkdir(path.c_str(), 0777) == 0) {
      commit.directory_ = path;
    } else if (errno != EEXIST) {
      return MakeError(
          ExitCode::kIo, "CKPT-SAVE",
          path + ": cannot make the directory: " + std::generic_category().message(errno));
    }
  }
  return commit;
}

StatusOr<std::string> CheckpointCommit::Finish(
    CheckpointInfo info, const std::vector<WrittenSlices>& written, const std::string& config_yaml,
    const std::vector<std::pair<std::string, std::string>>& extra_files) {
  info.save_id = save_id_;
  info.global_step = global_step_;
  SALA_ASSIGN_OR_RETURN(const checkpoint::Index index, MergeIndex(written));
  const auto write_all = [&]() -> StatusOr<std::string> {
    json files = json::array();
    for (const WrittenSlices& part : written) {
      for (const json& file : part.json["files"]) files.push_back(file);
    }
    SALA_RETURN_IF_ERROR(
        checkpoint::WriteIndex(directory_ + "/" + checkpoint::kIndexName, save_id_, index));
    std::vector<std::pair<std::string, std::string>> texts = extra_files;
    texts.emplace_back(checkpoint::kConfigName, config_yaml);
    for (const auto& [name, text] : texts)
      SALA_RETURN_IF_ERROR(WriteFileAtomically(directory_ + "/" + name, text));
    texts.emplace_back(checkpoint::kIndexName, "");
    for (const auto& [name, text] : texts) {
      SALA_ASSIGN_OR_RETURN(const json record, FileRecord(directory_, name));
      files.push_back(record);
    }
    FaultPoint("before-manifest");
    SALA_RETURN_IF_ERROR(
        WriteFileAtomically(directory_ + "/" + checkpoint::kManifestName,
                            checkpoint::SealManifest(MakeManifest(info, files, index))));
    FaultPoint("after-manifest");
    const std::string name = checkpoint::StepName(global_step_);
    const std::string target = root_ + "/" + name;
    FaultPoint("before-rename");
    if (PathExists(target)) {
      // The same step saved again (after a restart from an earlier checkpoint). The two change
      // places in one step, so that a complete checkpoint has the name at every moment; the old one
      // is then left under the temporary name.
      SALA_RETURN_IF_ERROR(ExchangePaths(directory_, target));
      SALA_RETURN_IF_ERROR(FsyncDirectory(root_));
      SALA_RETURN_IF_ERROR(RemoveTree(directory_));
    } else {
      SALA_RETURN_IF_ERROR(RenamePath(directory_, target));
      SALA_RETURN_IF_ERROR(FsyncDirectory(root_));
    }
    directory_ = target;
    return target;
  };
  StatusOr<std::string> target = write_all();
  if (!target.ok()) return SaveError(target.status());
  return target;
}

void CheckpointCommit::Abandon() {
  if (directory_.empty()) return;
  const std::string deleted =
      root_ + "/.del-" + checkpoint::StepName(global_step_) + "-" + save_id_;
  // Best effort: whatever stays has a name that readers ignore and the next start removes.
  const Status renamed = RenamePath(directory_, deleted);
  RemoveTree(renamed.ok() ? deleted : directory_).IgnoreError();
  directory_.clear();
}

}  // namespace sala
