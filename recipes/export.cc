#include "recipes/export.h"

#include <cmath>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/safetensors.h"
#include "recipes/hf_config.h"

namespace sala::recipes {
namespace {

constexpr char kEmbedding[] = "model.embed_tokens.weight";
constexpr char kHead[] = "lm_head.weight";

Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

// What is written of the parameters: their own floats, or a bf16 copy.
struct Weights {
  std::vector<std::vector<BF16>> rounded;  // per tensor, bf16 only
  std::vector<SafetensorsTensor> tensors;
  int64_t bytes = 0;
};

StatusOr<Weights> ConvertWeights(const model::ParameterStore& params, DType dtype) {
  Weights weights;
  const auto item = static_cast<int64_t>(SizeOf(dtype));
  for (const model::ParameterSpec& spec : params.specs()) {
    const float* data = params.data() + spec.offset;
    SafetensorsTensor tensor{.name = spec.name, .dtype = dtype, .shape = spec.shape, .data = data};
    std::vector<BF16> rounded(dtype == DType::kBF16 ? static_cast<size_t>(spec.numel) : 0);
    for (int64_t i = 0; i < spec.numel; ++i) {
      float written = data[i];
      if (dtype == DType::kBF16) {
        rounded[static_cast<size_t>(i)] = BF16(data[i]);
        written = static_cast<float>(rounded[static_cast<size_t>(i)]);
      }
      if (!std::isfinite(written)) {
        return DataError("EXP-NUMBERS",
                         spec.name + ": element " + std::to_string(i) + " is " +
                             std::to_string(data[i]) +
                             (std::isfinite(data[i]) ? ", too large for bf16; use --dtype f32"
                                                     : "; take an earlier checkpoint"));
      }
    }
    if (dtype == DType::kBF16) {
      weights.rounded.push_back(std::move(rounded));
      tensor.data = weights.rounded.back().data();
    }
    weights.bytes += spec.numel * item;
    weights.tensors.push_back(std::move(tensor));
  }
  return weights;
}

// Everything that ends a generation: the model's eos, the tokenizer's, the end of a chat turn.
std::vector<int64_t> EosIds(const model::ModelConfig& config, const data::Tokenizer* tokenizer) {
  std::vector<int64_t> ids = {config.eos_token_id};
  if (tokenizer == nullptr) return ids;
  const auto im_end = tokenizer->added_tokens().find(data::kImEnd);
  if (im_end != tokenizer->added_tokens().end() && im_end->second != config.eos_token_id)
    ids.push_back(im_end->second);
  return ids;
}

// "" when a folder may be made at this place, else what stands in the way.
StatusOr<std::string> Obstacle(const std::string& directory, bool force) {
  if (!PathExists(directory)) return std::string();
  if (!IsDirectory(directory)) return directory + " is a file";
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  if (names.empty()) return std::string();
  if (!force) return directory + " exists and is not empty; name another directory or add --force";
  // --force replaces models, not whatever else a mistyped path may hold.
  if (!PathExists(directory + "/config.json"))
    return directory + " is not an exported model (no config.json); remove it yourself";
  return std::string();
}

Status VerifyExport(const std::string& directory, const Weights& weights,
                    const nlohmann::json& hf_config) {
  SALA_ASSIGN_OR_RETURN(const SafetensorsModel stored, SafetensorsModel::Open(directory));
  if (stored.names().size() != weights.tensors.size()) {
    return DataError("EXP-VERIFY", directory + ": read back " +
                                       std::to_string(stored.names().size()) + " tensors, wrote " +
                                       std::to_string(weights.tensors.size()));
  }
  for (const SafetensorsTensor& tensor : weights.tensors) {
    SALA_ASSIGN_OR_RETURN(const std::string bytes, stored.RawBytes(tensor.name));
    const SafetensorsEntry* entry = stored.Find(tensor.name);
    int64_t numel = 1;
    for (const int64_t n : tensor.shape) numel *= n;
    if (entry == nullptr || entry->shape != tensor.shape ||
        bytes.size() != static_cast<size_t>(numel) * SizeOf(tensor.dtype) ||
        std::memcmp(bytes.data(), tensor.data, bytes.size()) != 0) {
      return DataError("EXP-VERIFY",
                       directory + ": tensor " + tensor.name +
                           " read back differs from what was written; check the disk");
    }
  }
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(directory + "/config.json"));
  if (nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false) != hf_config) {
    return DataError(
        "EXP-VERIFY",
        directory + "/config.json: read back differs from what was written; check the disk");
  }
  return OkStatus();
}

// The configuration read back must describe the same model (linear-layer fields aside where there
// is no linear layer).
Status CheckConfigRoundTrip(const model::ModelConfig& config, const nlohmann::json& hf_config,
                            const HfConfigOptions& hf) {
  SALA_ASSIGN_OR_RETURN(const model::ModelConfig back, ModelConfigFromHf(hf_config, "config.json"));
  SALA_ASSIGN_OR_RETURN(const nlohmann::json again, HfConfig(back, hf));
  if (again == hf_config) return OkStatus();
  const nlohmann::json patch = nlohmann::json::diff(hf_config, again);
  return DataError("EXP-FIELD",
                   "config.json does not give the model back: " + Printable(patch.dump()) +
                       " (model of " + std::to_string(config.num_hidden_layers) + " layers)");
}

StatusOr<std::string> FileSha256(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  Sha256 hash;
  hash.Update(file.data(), file.size());
  return hash.HexDigest();
}

Status WriteExportRecord(const std::string& directory, const nlohmann::json& source,
                         const std::string& tokenizer_fingerprint, const ExportReport& report,
                         DType dtype) {
  nlohmann::json files = nlohmann::json::object();
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  for (const std::string& name : names) {
    SALA_ASSIGN_OR_RETURN(files[name], FileSha256(directory + "/" + name));
  }
  const nlohmann::json record = {{"format", "export"},
                                 {"version", 1},
                                 {"source", source},
                                 {"tokenizer_fingerprint", tokenizer_fingerprint},
                                 {"dtype", NameOf(dtype)},
                                 {"tensors", report.tensors},
                                 {"parameters", report.parameters},
                                 {"sha256", files}};
  return WriteFileAtomically(directory + "/export.json", record.dump(2) + "\n");
}

// Everything, in a directory nobody looks at yet.
Status WriteFolder(const std::string& directory, const Weights& weights,
                   const nlohmann::json& hf_config, const nlohmann::json& generation,
                   const data::Tokenizer* tokenizer, const nlohmann::json& source,
                   const ExportOptions& options, ExportReport* report) {
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  SALA_RETURN_IF_ERROR(WriteSafetensorsModel(directory, weights.tensors, options.max_shard_bytes));
  if (tokenizer != nullptr) SALA_RETURN_IF_ERROR(tokenizer->SaveTo(directory));
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/config.json", hf_config.dump(2) + "\n"));
  SALA_RETURN_IF_ERROR(
      WriteFileAtomically(directory + "/generation_config.json", generation.dump(2) + "\n"));
  if (options.verify) {
    SALA_RETURN_IF_ERROR(VerifyExport(directory, weights, hf_config));
    report->verified = true;
  }
  SALA_RETURN_IF_ERROR(WriteExportRecord(
      directory, source,
      tokenizer != nullptr ? tokenizer->fingerprint() : options.tokenizer_fingerprint, *report,
      options.dtype));
  return FsyncDirectory(directory);
}

std::string Parent(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string WithoutTrailingSlashes(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

// Puts `temporary` in the place of `directory`, which is absent, empty or to be replaced.
Status MoveIntoPlace(const std::string& temporary, const std::string& directory) {
  if (PathExists(directory)) {
    const std::string old = directory + ".replaced-export";
    SALA_RETURN_IF_ERROR(RemoveTree(old));
    SALA_RETURN_IF_ERROR(RenamePath(directory, old));
    if (Status moved = RenamePath(temporary, directory); !moved.ok()) {
      static_cast<void>(RenamePath(old, directory));  // what was there comes back
      return moved;
    }
    SALA_RETURN_IF_ERROR(RemoveTree(old));
  } else {
    SALA_RETURN_IF_ERROR(RenamePath(temporary, directory));
  }
  return FsyncDirectory(Parent(directory));
}

Status CheckVocabulary(const model::ModelConfig& config, const data::Tokenizer* tokenizer) {
  if (tokenizer == nullptr || tokenizer->vocab_size() <= config.vocab_size) return OkStatus();
  return DataError("EXP-TOKENIZER", "the tokenizer has " + std::to_string(tokenizer->vocab_size()) +
                                        " tokens, the model " + std::to_string(config.vocab_size) +
                                        "; name the tokenizer the model was trained with");
}

std::string ListSome(const std::vector<std::string>& names) {
  constexpr size_t kShown = 8;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kShown; ++i)
    text += (i == 0 ? "" : ", ") + Printable(names[i]);
  if (names.size() > kShown) text += " and " + std::to_string(names.size() - kShown) + " more";
  return text;
}

// Tensors of the file that no parameter takes. A tied model's file may repeat the embedding as the
// head, and old files carry rotary tables, which are computed here.
std::vector<std::string> ExtraTensors(const SafetensorsModel& stored,
                                      const model::ParameterStore& params) {
  const std::string rotary = "rotary_emb.inv_freq";
  std::vector<std::string> extra;
  for (const std::string& name : stored.names()) {
    const bool table = name.size() > rotary.size() &&
                       name.compare(name.size() - rotary.size(), rotary.size(), rotary) == 0;
    if (!params.Has(name) && !table) extra.push_back(name);
  }
  return extra;
}

// "" where the folder has no record, as those of other programs.
StatusOr<std::string> RecordedTokenizer(const std::string& directory) {
  const std::string path = directory + "/export.json";
  if (!PathExists(path)) return std::string();
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const nlohmann::json record = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!record.is_object()) return DataError("IMP-FIELD", path + ": not a JSON object");
  const auto fingerprint = record.find("tokenizer_fingerprint");
  if (fingerprint == record.end()) return std::string();  // of an older version
  if (!fingerprint->is_string()) {
    return DataError("IMP-FIELD", path + ": tokenizer_fingerprint is not a text");
  }
  return fingerprint->get<std::string>();
}

}  // namespace

StatusOr<ExportReport> ExportModel(const model::ModelConfig& config,
                                   const model::ParameterStore& params,
                                   const data::Tokenizer* tokenizer, const nlohmann::json& source,
                                   const ExportOptions& options) {
  const std::string directory = WithoutTrailingSlashes(options.directory);
  SALA_ASSIGN_OR_RETURN(const std::string obstacle, Obstacle(directory, options.force));
  if (!obstacle.empty()) return MakeError(ExitCode::kIo, "EXP-EXISTS", obstacle);
  SALA_RETURN_IF_ERROR(CheckVocabulary(config, tokenizer));
  const HfConfigOptions hf{.dtype = options.dtype, .eos_token_ids = EosIds(config, tokenizer)};
  SALA_ASSIGN_OR_RETURN(const nlohmann::json hf_config, HfConfig(config, hf));
  SALA_RETURN_IF_ERROR(CheckConfigRoundTrip(config, hf_config, hf));
  if (config.has_lightning() && config.mixer(0) != model::MixerType::kSoftmax) {
    SALA_LOG(Warn) << "layer 0 is a linear layer: the published model code counts cached tokens in "
                      "layer 0 and needs a softmax layer there";
  }
  SALA_ASSIGN_OR_RETURN(const Weights weights, ConvertWeights(params, options.dtype));
  ExportReport report{.tensors = static_cast<int64_t>(weights.tensors.size()),
                      .parameters = params.parameters(),
                      .bytes = weights.bytes};
  const std::string temporary = directory + ".tmp-export";
  SALA_RETURN_IF_ERROR(RemoveTree(temporary));
  Status written = WriteFolder(temporary, weights, hf_config, HfGenerationConfig(config, hf),
                               tokenizer, source, options, &report);
  if (written.ok()) written = MoveIntoPlace(temporary, directory);
  if (!written.ok()) {
    static_cast<void>(RemoveTree(temporary));  // the first error is the one to report
    return written;
  }
  return report;
}

StatusOr<std::string> TokenizerPathFor(const std::string& model_path, const std::string& named) {
  if (!named.empty()) return named;
  const std::string path = WithoutTrailingSlashes(model_path);
  const std::string in_run = path + "/../../tokenizer";
  if (PathExists(path + "/manifest.json") && IsDirectory(in_run)) return in_run;
  for (const char* file : {"tokenizer.model", "byte_tokenizer.json"}) {
    if (PathExists(path + "/" + file)) return path;
  }
  if (!PathExists(path + "/manifest.json") && !PathExists(path + "/config.json")) {
    const bool run = IsDirectory(path + "/checkpoints");
    return MakeError(
        ExitCode::kNoInput, "FILE-MISSING",
        Printable(path) + (run ? ": is a run directory; name one of its checkpoints, which sala "
                                 "ckpt list shows"
                               : ": holds neither a checkpoint (manifest.json) nor an exported "
                                 "model (config.json)"));
  }
  return MakeError(
      ExitCode::kNoInput, "EXP-TOKENIZER",
      Printable(path) +
          ": no tokenizer in the run directory or beside the weights; name one with --tokenizer");
}

StatusOr<model::ModelConfig> HfFolderConfig(const std::string& directory) {
  const std::string path = directory + "/config.json";
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return DataError("IMP-FIELD", path + ": not valid JSON");
  return ModelConfigFromHf(json, path);
}

StatusOr<HfFolder> LoadHfFolder(const std::string& directory) {
  const std::string config_path = directory + "/config.json";
  HfFolder model;
  SALA_ASSIGN_OR_RETURN(model.config, HfFolderConfig(directory));
  SALA_ASSIGN_OR_RETURN(model.tokenizer_fingerprint, RecordedTokenizer(directory));
  const bool tied = std::exchange(model.config.tie_word_embeddings, false);
  if (PathExists(directory + "/pytorch_model.bin") &&
      !PathExists(directory + "/model.safetensors") &&
      !PathExists(directory + "/model.safetensors.index.json")) {
    return DataError(
        "IMP-ARCH",
        directory +
            ": pytorch_model.bin is a pickle, which can run code; convert it to safetensors");
  }
  SALA_ASSIGN_OR_RETURN(const SafetensorsModel stored, SafetensorsModel::Open(directory));
  const std::vector<model::ParameterSpec> specs = model::ParameterSpecs(model.config);
  const auto source_of = [&](const std::string& name) {
    return tied && name == kHead ? std::string(kEmbedding) : name;
  };
  std::vector<std::string> missing;
  for (const model::ParameterSpec& spec : specs) {
    const std::string source = source_of(spec.name);
    const SafetensorsEntry* entry = stored.Find(source);
    if (entry == nullptr) {
      missing.push_back(spec.name);
    } else if (entry->shape != spec.shape) {
      return DataError(
          "IMP-SHAPE",
          directory + ": " + spec.name +
              " has another shape than config.json says; the two do not belong together");
    }
  }
  if (!missing.empty()) {
    return DataError("IMP-MISSING", directory + ": " + std::to_string(missing.size()) +
                                        " tensors are missing: " + ListSome(missing));
  }
  model.params = model::ParameterStore(specs);
  if (const std::vector<std::string> extra = ExtraTensors(stored, model.params); !extra.empty()) {
    const bool bias = extra[0].size() > 5 && extra[0].compare(extra[0].size() - 5, 5, ".bias") == 0;
    return DataError(bias ? "IMP-BIAS" : "IMP-EXTRA",
                     directory + ": " + std::to_string(extra.size()) +
                         " tensors that the configuration has no place for: " + ListSome(extra));
  }
  for (const model::ParameterSpec& spec : model.params.specs()) {
    SALA_RETURN_IF_ERROR(
        stored.ReadF32(source_of(spec.name), spec.shape, model.params.data() + spec.offset));
  }
  return model;
}

}  // namespace sala::recipes
