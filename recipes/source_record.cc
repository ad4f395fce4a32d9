#include "recipes/source_record.h"

#include <algorithm>

#include "core/checkpoint.h"
#include "core/file.h"
#include "core/safetensors.h"
#include "core/safetensors_header.h"
#include "data/tokenizer_files.h"
#include "recipes/hf_folder.h"

namespace sala::recipes {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr int kVersion = 1;

Status OtherVersion(const std::string& path, const std::string& what) {
  return MakeError(ExitCode::kData, "CKPT-VERSION",
                   path + ": written by another version of this program (" + Printable(what) +
                       "); use that version, or import the folder again");
}

}  // namespace

std::string SourceRecord::ToText() const {
  ordered_json files = ordered_json::array();
  for (const auto& [name, header] : headers) files.push_back({{"name", name}, {"header", header}});
  ordered_json record = {
      {"format", "source-folder"},         {"version", kVersion}, {"config", config},
      {"generation_config", nullptr},      {"index", index},      {"files", files},
      {"tokenizer_files", tokenizer_files}};
  if (generation_config) record["generation_config"] = *generation_config;
  return record.dump(2) + "\n";
}

StatusOr<SourceRecord> SourceRecord::Parse(const std::string& text, const std::string& path) {
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  try {
    SourceRecord record;
    if (root.at("version") != kVersion)
      return OtherVersion(path, "version " + root.at("version").dump());
    record.config = root.at("config").get<std::string>();
    if (!root.at("generation_config").is_null())
      record.generation_config = root.at("generation_config").get<std::string>();
    record.index = root.at("index").get<std::string>();
    for (const json& file : root.at("files"))
      record.headers.emplace_back(file.at("name").get<std::string>(),
                                  file.at("header").get<std::string>());
    record.tokenizer_files = root.at("tokenizer_files").get<std::vector<std::string>>();
    // The names are written to again by an export.
    for (const auto& [name, header] : record.headers) {
      if (!IsWeightsFileName(name))
        return OtherVersion(path, "a file of weights " + Printable(name));
    }
    const auto& known = data::kTokenizerFiles;
    for (const std::string& name : record.tokenizer_files) {
      if (std::find(known.begin(), known.end(), name) == known.end())
        return OtherVersion(path, "a tokenizer file " + Printable(name));
    }
    return record;
  } catch (const json::exception& error) {
    return OtherVersion(path, error.what());
  }
}

std::optional<std::vector<SourceRecord::Tensor>> SourceRecord::Tensors() const {
  std::vector<Tensor> tensors;
  for (const auto& [file, header] : headers) {
    const auto root = ParseUniqueJson(header, file);
    if (!root.ok()) return std::nullopt;
    for (const auto& [name, entry] : root->items()) {
      if (name == "__metadata__") continue;
      const std::optional<WeightType> type =
          WeightTypeOfFormat(entry.value("dtype", std::string()));
      if (!type) return std::nullopt;
      tensors.push_back({name, *type, entry.value("shape", std::vector<int64_t>())});
    }
  }
  return tensors;
}

std::optional<WeightType> SourceRecord::type() const {
  const auto tensors = Tensors();
  if (!tensors) return std::nullopt;
  for (const Tensor& tensor : *tensors) {
    if (tensor.name == kEmbeddingName) return tensor.type;
  }
  return std::nullopt;
}

StatusOr<std::optional<SourceRecord>> SourceRecordAt(const std::string& path) {
  std::optional<SourceRecord> record;
  if (IsHfFolder(path)) {
    SALA_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Open(path));
    SALA_ASSIGN_OR_RETURN(record, folder.Record());
    return record;
  }
  if (!PathExists(path + "/" + SourceRecord::kFileName)) return record;
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(path));
  SALA_ASSIGN_OR_RETURN(const std::string text, checkpoint.ReadExtra(SourceRecord::kFileName));
  SALA_ASSIGN_OR_RETURN(record, SourceRecord::Parse(text, path + "/" + SourceRecord::kFileName));
  return record;
}

}  // namespace sala::recipes
