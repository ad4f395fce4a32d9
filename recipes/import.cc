#include "recipes/import.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "core/checkpoint.h"
#include "core/config.h"
#include "core/file.h"
#include "core/hash.h"
#include "data/tokenizer.h"
#include "data/tokenizer_files.h"

namespace sala::recipes {
namespace {

// Tensors go to disk in groups of at most this many elements, each a file of its own.
constexpr int64_t kGroupElements = int64_t{1} << 28;

// In the run directory, until all of the tokenizer's files are there.
constexpr char kUnfinishedTokenizer[] = "/tokenizer.tmp-import";
// Where a tokenizer keeps the ids that it knows from the model beside it.
constexpr char kIdsOfModel[] = "generation_config.json";

// What a checkpoint's config.yaml says in place of a stage.
struct ImportRecord {
  std::string kind = "import";
  std::string name = "import";
  std::string from;
  bool sparse_attention = false;  // as `sala generate` reads it: a hybrid's long stages used it

  void Bind(ConfigBinder& b) {
    b.Field("kind", &kind);
    b.Field("name", &name);
    b.Field("from", &from);
    b.Field("sparse_attention", &sparse_attention);
  }
};

std::string WithoutLayer(const std::string& name) {
  constexpr char kLayers[] = "model.layers.";
  const size_t begin = std::strlen(kLayers);
  if (name.rfind(kLayers, 0) != 0) return name;
  const size_t end = name.find('.', begin);
  return name.substr(0, begin) + "*" + (end == std::string::npos ? "" : name.substr(end));
}

// Sums of a kind, from which its numbers follow.
struct Sums {
  double sum = 0, squares = 0, absolute_max = 0;
};

class Kinds {
 public:
  explicit Kinds(const ModelFolder& folder) : folder_(folder) {
    for (const model::ParameterSpec& spec : folder.specs()) {
      const std::string kind = WithoutLayer(spec.name);
      const std::string type = folder.EntryOf(spec).dtype;
      const auto key = std::make_tuple(kind, type, spec.shape);
      const auto [at, is_new] = places_.emplace(key, reports_.size());
      if (is_new) {
        reports_.push_back({.kind = kind, .type = type, .shape = spec.shape});
        sums_.emplace_back();
      }
      ++reports_[at->second].tensors;
      reports_[at->second].elements += spec.numel;
    }
  }

  void Add(const model::ParameterSpec& spec, const Sums& sums) {
    Sums& all =
        sums_[places_.at({WithoutLayer(spec.name), folder_.EntryOf(spec).dtype, spec.shape})];
    all.sum += sums.sum;
    all.squares += sums.squares;
    all.absolute_max = std::max(all.absolute_max, sums.absolute_max);
  }

  std::vector<TensorKindReport> Reports() const {
    std::vector<TensorKindReport> reports = reports_;
    for (size_t i = 0; i < reports.size(); ++i) {
      const auto n = static_cast<double>(std::max<int64_t>(reports[i].elements, 1));
      reports[i].mean = sums_[i].sum / n;
      reports[i].standard_deviation =
          std::sqrt(std::max(0.0, sums_[i].squares / n - reports[i].mean * reports[i].mean));
      reports[i].absolute_max = sums_[i].absolute_max;
    }
    return reports;
  }

 private:
  const ModelFolder& folder_;
  std::map<std::tuple<std::string, std::string, std::vector<int64_t>>, size_t> places_;
  std::vector<TensorKindReport> reports_;
  std::vector<Sums> sums_;
};

// Reads one tensor, adds up its numbers and counts values that float32 does not hold.
StatusOr<Sums> ReadTensor(const ModelFolder& folder, const model::ParameterSpec& spec, float* out,
                          int64_t* rounded) {
  SALA_RETURN_IF_ERROR(folder.Read(spec, 0, spec.numel, out));
  const bool wide = folder.EntryOf(spec).dtype == "F64";
  const char* stored = folder.DataOf(spec);
  Sums sums;
  for (int64_t i = 0; i < spec.numel; ++i) {
    double value = out[i];
    if (wide) {
      std::memcpy(&value, stored + i * static_cast<int64_t>(sizeof value), sizeof value);
      *rounded += std::isfinite(value) && value != static_cast<double>(out[i]) ? 1 : 0;
    }
    if (!std::isfinite(out[i])) {
      return MakeError(
          ExitCode::kData, "IMP-NUMBERS",
          folder.directory() + ": " + spec.name + ": element " + std::to_string(i) + " is " +
              (std::isfinite(value) ? nlohmann::json(value).dump() + ", too large for float32"
                                    : std::to_string(value) + ", not a finite number") +
              "; take another copy or an earlier version of the model");
    }
    const double number = out[i];
    sums.sum += number;
    sums.squares += number * number;
    sums.absolute_max = std::max(sums.absolute_max, std::fabs(number));
  }
  return sums;
}

// The folder's tokenizer; null where it has none or it is not read here, which is no hindrance.
std::unique_ptr<data::Tokenizer> TokenizerOf(const ModelFolder& folder, std::string* problem) {
  if (folder.TokenizerFiles().empty()) return nullptr;
  auto tokenizer = data::LoadTokenizer(folder.directory());
  if (tokenizer.ok()) return std::move(*tokenizer);
  *problem = MessageOf(tokenizer.status());
  return nullptr;
}

ImportReport ReportOf(const ModelFolder& folder, const Kinds& kinds) {
  ImportReport report;
  report.model_type = folder.model_type();
  report.config = folder.config();
  report.untied = folder.untied();
  report.kinds = kinds.Reports();
  report.tensors = static_cast<int64_t>(folder.specs().size());
  for (const model::ParameterSpec& spec : folder.specs()) report.parameters += spec.numel;
  report.tokenizer_files = folder.TokenizerFiles();
  return report;
}

// Whether every file of the tokenizer directory of a run is the folder's, or made by its import.
bool IsTokenizerOf(const std::string& folder, const std::string& directory) {
  const auto names = ListDirectory(directory);
  return names.ok() && std::all_of(names->begin(), names->end(), [&](const std::string& name) {
           if (name == kIdsOfModel) return true;
           const auto copy = ReadFile(directory + "/" + name);
           const auto original = ReadFile(folder + "/" + name);
           return copy.ok() && original.ok() && *copy == *original;
         });
}

// What an interrupted import of this folder leaves: a save that was not finished, the tokenizer
// with it. In a run that goes on the save may still be written, and is left alone.
Status RemoveInterrupted(const std::string& folder, const std::string& run) {
  if (PathExists(run + "/RUN.lock") || !ListCheckpoints(run + "/checkpoints").empty())
    return OkStatus();
  SALA_RETURN_IF_ERROR(RemoveLeftovers(run + "/checkpoints"));
  SALA_RETURN_IF_ERROR(RemoveTree(run + kUnfinishedTokenizer));
  if (PathExists(run + "/checkpoints") && IsTokenizerOf(folder, run + "/tokenizer"))
    SALA_RETURN_IF_ERROR(RemoveTree(run + "/tokenizer"));
  return OkStatus();
}

Status CheckPlace(const std::string& folder, const std::string& run) {
  if (IsHfFolder(run)) {
    return MakeError(ExitCode::kIo, "IMP-EXISTS",
                     run +
                         ": is a model folder (config.json), not a run directory; name one that "
                         "is new");
  }
  SALA_RETURN_IF_ERROR(RemoveInterrupted(folder, run));
  for (const char* name : {"/checkpoints", "/tokenizer"}) {
    const std::string path = run + name;
    if (!PathExists(path)) continue;
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(path));
    if (!names.empty()) {
      return MakeError(ExitCode::kIo, "IMP-EXISTS",
                       path + ": exists and is not empty; name another run directory");
    }
  }
  return OkStatus();
}

// The tensors, group after group, so that memory holds one group.
StatusOr<std::vector<WrittenSlices>> WriteTensors(const ModelFolder& folder,
                                                  const CheckpointCommit& commit, Kinds* kinds,
                                                  int64_t* rounded) {
  std::vector<WrittenSlices> written;
  const std::vector<model::ParameterSpec>& specs = folder.specs();
  for (size_t at = 0; at < specs.size();) {
    size_t end = at;
    int64_t elements = 0;
    while (end < specs.size() && (end == at || elements + specs[end].numel <= kGroupElements))
      elements += specs[end++].numel;
    std::vector<float> values(static_cast<size_t>(elements));
    std::vector<TensorSlice> slices;
    float* out = values.data();
    for (; at < end; ++at) {
      SALA_ASSIGN_OR_RETURN(const Sums sums, ReadTensor(folder, specs[at], out, rounded));
      kinds->Add(specs[at], sums);
      TensorSlice slice;
      slice.name = specs[at].name;
      slice.shape = specs[at].shape;
      slice.data = out;
      slices.push_back(slice);
      out += specs[at].numel;
    }
    SALA_ASSIGN_OR_RETURN(
        WrittenSlices group,
        WriteCheckpointSlices(commit.directory(), static_cast<int>(written.size()),
                              commit.save_id(), slices));
    written.push_back(std::move(group));
  }
  return written;
}

// Returns whether the folder has one.
StatusOr<bool> WriteTokenizer(const ModelFolder& folder, const data::Tokenizer* tokenizer,
                              const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> copied,
                        data::CopyTokenizerFiles(folder.directory(), directory));
  // Only this form has ids from the model's own files, which are not among those copied.
  if (tokenizer != nullptr && tokenizer->name() == data::kHfTokenizerFile)
    SALA_RETURN_IF_ERROR(tokenizer->SaveTo(directory));
  return !copied.empty();
}

StatusOr<CheckpointInfo> MakeInfo(const ModelFolder& folder, const std::string& model_yaml,
                                  const data::Tokenizer* tokenizer, const ImportReport& report) {
  CheckpointInfo info;
  info.stage = {
      {"name", "import"}, {"index", 0}, {"phase", "import"}, {"step", 0}, {"final", true}};
  info.program = {{"name", "sala"}, {"version", SALA_VERSION}};
  info.topology = {{"world", 1}, {"dp", 1}, {"tp", 1}, {"cp", 1}, {"pp", 1}, {"zero_stage", 0}};
  info.model = {{"config_sha256", Sha256Hex(model_yaml)},
                {"parameters", report.parameters},
                {"tensors", report.tensors},
                {"mixer_types", report.config.mixer_types}};
  info.tokenizer_fingerprint = folder.tokenizer_fingerprint();
  info.trainer = nlohmann::json::object();
  if (info.tokenizer_fingerprint.empty() && tokenizer != nullptr)
    info.tokenizer_fingerprint = tokenizer->fingerprint();
  return info;
}

StatusOr<std::string> WriteCheckpoint(const ModelFolder& folder, const std::string& run,
                                      const data::Tokenizer* tokenizer, Kinds* kinds,
                                      ImportReport* report) {
  SALA_ASSIGN_OR_RETURN(const SourceRecord record, folder.Record());
  SALA_ASSIGN_OR_RETURN(
      CheckpointCommit commit,
      CheckpointCommit::Begin(run + "/checkpoints", 0,
                              report->parameters * static_cast<int64_t>(sizeof(float))));
  const auto write = [&]() -> StatusOr<std::string> {
    SALA_ASSIGN_OR_RETURN(const std::vector<WrittenSlices> written,
                          WriteTensors(folder, commit, kinds, &report->rounded));
    const std::string model_yaml = EmitConfig(report->config);
    SALA_ASSIGN_OR_RETURN(const CheckpointInfo info,
                          MakeInfo(folder, model_yaml, tokenizer, *report));
    ImportRecord config;
    config.from = folder.directory();
    config.sparse_attention = report->config.has_lightning();
    SALA_ASSIGN_OR_RETURN(const bool written_tokenizer,
                          WriteTokenizer(folder, tokenizer, run + kUnfinishedTokenizer));
    if (written_tokenizer)
      SALA_RETURN_IF_ERROR(RenamePath(run + kUnfinishedTokenizer, run + "/tokenizer"));
    return commit.Finish(info, written, EmitConfig(config),
                         {{"model.yaml", model_yaml}, {SourceRecord::kFileName, record.ToText()}});
  };
  StatusOr<std::string> directory = write();
  if (!directory.ok()) {
    commit.Abandon();
    // Which CheckPlace found empty or absent.
    for (const char* name : {kUnfinishedTokenizer, "/tokenizer"})
      RemoveTree(run + name).IgnoreError();
  }
  return directory;
}

}  // namespace

StatusOr<ImportReport> CheckFolder(const std::string& directory,
                                   const ModelFolderOptions& options) {
  SALA_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Open(directory, options));
  ImportReport report = ReportOf(folder, Kinds(folder));
  TokenizerOf(folder, &report.tokenizer_problem);
  return report;
}

StatusOr<ImportReport> ImportFolder(const ImportOptions& options) {
  SALA_RETURN_IF_ERROR(CheckPlace(options.directory, options.run));
  SALA_ASSIGN_OR_RETURN(const ModelFolder folder,
                        ModelFolder::Open(options.directory, options.folder));
  SALA_RETURN_IF_ERROR(folder.CheckValues());
  Kinds kinds(folder);
  ImportReport report = ReportOf(folder, kinds);
  const std::unique_ptr<data::Tokenizer> tokenizer = TokenizerOf(folder, &report.tokenizer_problem);
  SALA_ASSIGN_OR_RETURN(report.checkpoint,
                        WriteCheckpoint(folder, options.run, tokenizer.get(), &kinds, &report));
  report.kinds = kinds.Reports();
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(report.checkpoint));
  SALA_RETURN_IF_ERROR(checkpoint.Verify(VerifyLevel::kDeep));
  return report;
}

}  // namespace sala::recipes
