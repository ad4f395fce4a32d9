#include "recipes/hf_folder.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "core/json.h"
#include "data/tokenizer_files.h"

namespace sala::recipes {
namespace {

Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

std::string ListSome(const std::vector<std::string>& names) {
  constexpr size_t kShown = 8;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kShown; ++i)
    text += (i == 0 ? "" : ", ") + Printable(names[i]);
  if (names.size() > kShown) text += " and " + std::to_string(names.size() - kShown) + " more";
  return text;
}

constexpr char kNotTogether[] = "; config.json and the weights do not belong together";

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string Counted(size_t n, const std::string& noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? " " : "s ");
}

std::string ShapeText(const std::vector<int64_t>& shape) { return nlohmann::json(shape).dump(); }

StatusOr<nlohmann::json> ParseConfig(const std::string& text, const std::string& path) {
  nlohmann::json json = ParseJson(text);
  if (json.is_discarded())
    return DataError(
        "IMP-FIELD",
        Printable(path) + ": not valid JSON, or nested more than 64 deep; fetch the file again");
  return json;
}

}  // namespace

bool IsHfFolder(const std::string& path) {
  return PathExists(path + "/config.json") && !PathExists(path + "/manifest.json");
}

StatusOr<ModelFolder> ModelFolder::Open(const std::string& directory,
                                        const ModelFolderOptions& options) {
  const std::string config_path = directory + "/config.json";
  if (!IsDirectory(directory))
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     Printable(directory) + ": no such folder; name the folder of a model");
  if (!PathExists(config_path)) {
    // Where the weights are of a form that is not read, that is what to say.
    if (const Status form = SafetensorsModel::Open(directory).status();
        ErrorCodeOf(form) == "ST-FORMAT")
      return form;
  }
  ModelFolder folder;
  folder.directory_ = directory;
  SALA_ASSIGN_OR_RETURN(folder.config_text_, ReadFile(config_path));
  SALA_ASSIGN_OR_RETURN(nlohmann::json json, ParseConfig(folder.config_text_, config_path));
  if (options.arch != "auto" && json.is_object()) {
    const nlohmann::json found = json.value("model_type", nlohmann::json(options.arch));
    if (found != options.arch) {
      return DataError("IMP-ARCH", config_path + ": model_type is " + Printable(found.dump()) +
                                       ", --arch says " + options.arch + "; leave --arch out");
    }
    json["model_type"] = options.arch;
  }
  SALA_ASSIGN_OR_RETURN(folder.config_, ModelConfigFromHf(json, config_path));
  folder.model_type_ = json["model_type"];
  folder.tied_ = folder.config_.tie_word_embeddings;
  folder.untied_ = folder.tied_ && !options.keep_tied;
  if (folder.untied_) folder.config_.tie_word_embeddings = false;
  SALA_RETURN_IF_ERROR(folder.ReadExportRecord());
  SALA_ASSIGN_OR_RETURN(folder.weights_, SafetensorsModel::Open(directory));
  folder.specs_ = model::ParameterSpecs(folder.config_);
  SALA_RETURN_IF_ERROR(folder.CheckTensors());
  return folder;
}

// What `sala export` wrote beside the weights; folders of other programs have no such file.
Status ModelFolder::ReadExportRecord() {
  const std::string path = directory_ + "/export.json";
  if (!PathExists(path)) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const nlohmann::json record = ParseJson(text);
  if (!record.is_object())
    return DataError("IMP-FIELD", Printable(path) + ": not a JSON object; export the model again");
  const auto fingerprint = record.find("tokenizer_fingerprint");
  if (fingerprint != record.end()) {  // an older version did not write it
    if (!fingerprint->is_string())
      return DataError(
          "IMP-FIELD",
          Printable(path) + ": tokenizer_fingerprint is not a text; export the model again");
    tokenizer_fingerprint_ = fingerprint->get<std::string>();
  }
  const auto shapes_only = record.find("shapes_only");
  shapes_only_ = shapes_only != record.end() && *shapes_only == true;
  return OkStatus();
}

std::string ModelFolder::SourceOf(const std::string& name) const {
  return untied_ && name == kHeadName ? kEmbeddingName : name;
}

// Names, shapes and types of the headers against what the configuration asks for.
Status ModelFolder::CheckTensors() const {
  std::vector<std::string> missing;
  std::vector<std::string> other;
  std::set<std::string> known;
  for (const model::ParameterSpec& spec : specs_) {
    known.insert(spec.name);
    const SafetensorsEntry* entry = weights_.Find(SourceOf(spec.name));
    if (entry == nullptr) {
      missing.push_back(spec.name);
    } else if (entry->shape != spec.shape) {
      other.push_back(spec.name + " has shape " + ShapeText(entry->shape) + ", expected " +
                      ShapeText(spec.shape));
    } else if (!WeightTypeOfFormat(entry->dtype)) {
      return DataError("ST-DTYPE", directory_ + ": tensor " + spec.name + " is " + entry->dtype +
                                       ", expected F32, BF16, F16 or F64; convert the weights");
    }
  }
  if (!missing.empty()) {
    return DataError("IMP-MISSING", directory_ + ": " + Counted(missing.size(), "tensor") +
                                        "that config.json asks for: missing " + ListSome(missing) +
                                        kNotTogether);
  }
  if (!other.empty()) {
    return DataError("IMP-SHAPE", directory_ + ": " + ListSome(other) + kNotTogether);
  }
  std::vector<std::string> extra;
  std::vector<std::string> biases;
  for (const std::string& name : weights_.names()) {
    // Old files carry rotary tables, which are computed here; a tied model's may repeat its
    // embedding as the head.
    if (known.count(name) > 0 || EndsWith(name, "rotary_emb.inv_freq") ||
        (tied_ && name == kHeadName))
      continue;
    (EndsWith(name, ".bias") ? biases : extra).push_back(name);
  }
  if (!biases.empty()) {
    return DataError("IMP-BIAS", directory_ + ": " + Counted(biases.size(), "bias tensor") +
                                     "that the model has no place for: " + ListSome(biases) +
                                     "; take a model without biases");
  }
  if (!extra.empty()) {
    return DataError("IMP-EXTRA", directory_ + ": " + Counted(extra.size(), "tensor") +
                                      "that the configuration has no place for: " +
                                      ListSome(extra) + kNotTogether);
  }
  return OkStatus();
}

const SafetensorsEntry& ModelFolder::EntryOf(const model::ParameterSpec& spec) const {
  const SafetensorsEntry* entry = weights_.Find(SourceOf(spec.name));
  SALA_CHECK(entry != nullptr) << spec.name;
  return *entry;
}

const char* ModelFolder::DataOf(const model::ParameterSpec& spec) const {
  return weights_.Data(SourceOf(spec.name));
}

Status ModelFolder::Read(const model::ParameterSpec& spec, int64_t begin, int64_t end,
                         float* out) const {
  const Status status = weights_.ReadBoxF32(SourceOf(spec.name), spec.global_shape, spec.box_offset,
                                            spec.box_shape(), begin, end, out);
  return status.ok() ? status : Annotate(status, directory_);
}

Status ModelFolder::CheckValues() const {
  if (shapes_only_) {
    return DataError("IMP-EMPTY", directory_ +
                                      ": written by export --shapes-only: it has headers and no "
                                      "values; only import --check reads it");
  }
  const SafetensorsEntry* head = weights_.Find(kHeadName);
  if (!tied_ || head == nullptr) return OkStatus();
  const SafetensorsEntry* embedding = weights_.Find(kEmbeddingName);
  if (head->dtype == embedding->dtype && head->shape == embedding->shape &&
      std::memcmp(weights_.Data(kHeadName), weights_.Data(kEmbeddingName),
                  static_cast<size_t>(head->bytes)) == 0)
    return OkStatus();
  return DataError("IMP-EXTRA", directory_ + ": " + kHeadName +
                                    " is not the embedding, but config.json says "
                                    "tie_word_embeddings: true; correct the one or the other");
}

std::vector<std::string> ModelFolder::TokenizerFiles() const {
  std::vector<std::string> files;
  for (const char* name : data::kTokenizerFiles) {
    if (PathExists(directory_ + "/" + name)) files.emplace_back(name);
  }
  return files;
}

StatusOr<SourceRecord> ModelFolder::Record() const {
  SourceRecord record;
  record.config = config_text_;
  const std::string generation = directory_ + "/generation_config.json";
  if (PathExists(generation)) {
    SALA_ASSIGN_OR_RETURN(record.generation_config, ReadFile(generation));
    SALA_RETURN_IF_ERROR(ParseConfig(*record.generation_config, generation).status());
  }
  record.index = weights_.index_text();
  for (size_t i = 0; i < weights_.files().size(); ++i) {
    record.headers.emplace_back(weights_.file_names()[i],
                                std::string(weights_.files()[i].HeaderText()));
  }
  record.tokenizer_files = TokenizerFiles();
  return record;
}

StatusOr<model::ModelConfig> HfFolderConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  SALA_ASSIGN_OR_RETURN(const nlohmann::json json, ParseConfig(text, path));
  SALA_ASSIGN_OR_RETURN(model::ModelConfig config, ModelConfigFromHf(json, path));
  config.tie_word_embeddings = false;
  return config;
}

StatusOr<HfFolder> LoadHfFolder(
    const std::string& directory,
    const std::function<StatusOr<model::ParameterStore>(const model::ModelConfig&)>& layout) {
  SALA_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Open(directory));
  SALA_RETURN_IF_ERROR(folder.CheckValues());
  HfFolder model;
  model.config = folder.config();
  model.tokenizer_fingerprint = folder.tokenizer_fingerprint();
  SALA_ASSIGN_OR_RETURN(model.record, folder.Record());
  if (layout) {
    SALA_ASSIGN_OR_RETURN(model.params, layout(model.config));
  } else {
    model.params = model::ParameterStore(folder.specs());
  }
  for (const model::ParameterSpec& spec : model.params.specs()) {
    Status status;
    model.params.ForEachPart(spec, [&](int64_t begin, int64_t end) {
      if (!status.ok()) return;
      status = folder.Read(spec, begin, end,
                           model.params.Flat(spec.offset + begin, spec.offset + end).Data<float>());
    });
    SALA_RETURN_IF_ERROR(status);
  }
  return model;
}

}  // namespace sala::recipes
