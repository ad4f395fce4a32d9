#include "recipes/export.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "core/file.h"
#include "core/half.h"
#include "core/hash.h"
#include "core/log.h"
#include "data/tokenizer_files.h"
#include "recipes/export_base.h"
#include "recipes/export_stops.h"

namespace sala::recipes {
namespace {

Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text);
}

// What is written of the parameters, in the order of the Hugging Face libraries.
struct Weights {
  std::vector<std::vector<char>> converted;  // per tensor that is not f32
  std::vector<SafetensorsTensor> tensors;
  int64_t bytes = 0;
};

struct Form {  // of one tensor
  DType dtype;
  const char* type;  // where the dtype has another name in the file
};

Form FormOf(WeightType type) {
  switch (type) {
    case WeightType::kF16:
      return {DType::kU16, "F16"};
    case WeightType::kF32:
      return {DType::kF32, ""};
    case WeightType::kF64:
      return {DType::kF64, ""};
    case WeightType::kBF16:
      break;
  }
  return {DType::kBF16, ""};
}

// Where the tensors of a layer stand; the files of sharded models are cut along this order.
int64_t RankInModel(const std::string& name) {
  static constexpr std::array<const char*, 15> kOrder = {
      "embed_tokens.weight",     "self_attn.q_proj.weight", "self_attn.k_proj.weight",
      "self_attn.v_proj.weight", "self_attn.o_proj.weight", "self_attn.o_gate.weight",
      "self_attn.z_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight",
      "self_attn.o_norm.weight", "mlp.gate_proj.weight",    "mlp.up_proj.weight",
      "mlp.down_proj.weight",    "input_layernorm.weight",  "post_attention_layernorm.weight"};
  const auto* at = std::find_if(kOrder.begin(), kOrder.end(), [&](const char* end) {
    return name.size() > std::strlen(end) &&
           name.compare(name.size() - std::strlen(end), std::string::npos, end) == 0;
  });
  return at - kOrder.begin();
}

std::vector<const model::ParameterSpec*> InFileOrder(
    const std::vector<model::ParameterSpec>& specs) {
  std::vector<const model::ParameterSpec*> order;
  order.reserve(specs.size());
  for (const model::ParameterSpec& spec : specs) order.push_back(&spec);
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::make_pair(a->unit, RankInModel(a->name)) <
           std::make_pair(b->unit, RankInModel(b->name));
  });
  return order;
}

using TypeOfTensor = std::function<WeightType(const std::string& name)>;

// Headers without values.
std::vector<SafetensorsTensor> TensorsOf(const std::vector<model::ParameterSpec>& specs,
                                         const TypeOfTensor& type_of) {
  std::vector<SafetensorsTensor> tensors;
  for (const model::ParameterSpec* spec : InFileOrder(specs)) {
    const Form form = FormOf(type_of(spec->name));
    tensors.push_back({.name = spec->name,
                       .dtype = form.dtype,
                       .shape = spec->shape,
                       .data = nullptr,
                       .type = form.type});
  }
  return tensors;
}

int64_t BytesOf(const std::vector<model::ParameterSpec>& specs, const TypeOfTensor& type_of) {
  int64_t bytes = 0;
  for (const model::ParameterSpec& spec : specs)
    bytes += spec.numel * static_cast<int64_t>(SizeOf(FormOf(type_of(spec.name)).dtype));
  return bytes;
}

// One value in the file's type at `out`; returns what it now is.
double Convert(float value, WeightType type, char* out) {
  const auto put = [out](const auto& written, double is) {
    std::memcpy(out, &written, sizeof written);
    return is;
  };
  switch (type) {
    case WeightType::kBF16: {
      const BF16 rounded(value);
      return put(rounded, static_cast<float>(rounded));
    }
    case WeightType::kF16: {
      const uint16_t rounded = FloatToHalf(value);
      return put(rounded, HalfToFloat(rounded));
    }
    case WeightType::kF64:
      return put(static_cast<double>(value), value);
    case WeightType::kF32:
      break;
  }
  return value;
}

StatusOr<Weights> ConvertWeights(const model::ParameterStore& params, const TypeOfTensor& type_of) {
  Weights weights;
  weights.tensors = TensorsOf(params.specs(), type_of);
  weights.bytes = BytesOf(params.specs(), type_of);
  for (SafetensorsTensor& tensor : weights.tensors) {
    const model::ParameterSpec& spec = params.Spec(tensor.name);
    const float* data = params.data() + spec.offset;
    const WeightType type = type_of(tensor.name);
    const size_t item = type == WeightType::kF32 ? 0 : SizeOf(tensor.dtype);
    std::vector<char> converted(item * static_cast<size_t>(spec.numel));
    for (int64_t i = 0; i < spec.numel; ++i) {
      char* out = converted.data() + item * static_cast<size_t>(i);
      if (std::isfinite(Convert(data[i], type, out))) continue;
      return DataError(
          "EXP-NUMBERS",
          spec.name + ": element " + std::to_string(i) + " is " + std::to_string(data[i]) +
              (std::isfinite(data[i])
                   ? ", too large for " + std::string(NameOf(type)) + "; use --dtype f32"
                   : "; take an earlier checkpoint"));
    }
    tensor.data = data;
    if (item > 0) {
      weights.converted.push_back(std::move(converted));
      tensor.data = weights.converted.back().data();
    }
  }
  return weights;
}

// "" when a folder may be made at this place, else what stands in the way.
StatusOr<std::string> Obstacle(const std::string& directory, bool force) {
  if (!PathExists(directory)) return std::string();
  if (!IsDirectory(directory)) return Printable(directory) + " is a file";
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  if (names.empty()) return std::string();
  if (!force)
    return Printable(directory) + " exists and is not empty; name another directory or add --force";
  // --force replaces models, not whatever else a mistyped path may hold.
  if (!PathExists(directory + "/config.json"))
    return Printable(directory) + " is not an exported model (no config.json); remove it yourself";
  return std::string();
}

// The small files, as texts.
struct Texts {
  std::string config;
  std::optional<std::string> generation;
};

Status VerifyExport(const std::string& directory, const Weights& weights, const Texts& texts) {
  SALA_ASSIGN_OR_RETURN(const SafetensorsModel stored, SafetensorsModel::Open(directory));
  if (stored.names().size() != weights.tensors.size()) {
    return DataError("EXP-VERIFY", Printable(directory) + ": read back " +
                                       std::to_string(stored.names().size()) + " tensors, wrote " +
                                       std::to_string(weights.tensors.size()));
  }
  for (const SafetensorsTensor& tensor : weights.tensors) {
    const SafetensorsEntry* entry = stored.Find(tensor.name);
    int64_t numel = 1;
    for (const int64_t n : tensor.shape) numel *= n;
    const size_t bytes = static_cast<size_t>(numel) * SizeOf(tensor.dtype);
    if (entry == nullptr || entry->shape != tensor.shape ||
        static_cast<size_t>(entry->bytes) != bytes ||
        std::memcmp(stored.Data(tensor.name), tensor.data, bytes) != 0) {
      return DataError("EXP-VERIFY",
                       Printable(directory) + ": tensor " + tensor.name +
                           " read back differs from what was written; check the disk");
    }
  }
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(directory + "/config.json"));
  if (text != texts.config) {
    return DataError("EXP-VERIFY",
                     Printable(directory) +
                         "/config.json: read back differs from what was written; check the disk");
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

// What export.json says; `hashed`: with the SHA-256 of every file.
Status WriteExportRecord(const std::string& directory, nlohmann::json record,
                         const ExportReport& report, bool hashed) {
  record["format"] = "export";
  record["version"] = 1;
  record["dtype"] = NameOf(report.dtype);
  record["tensors"] = report.tensors;
  record["parameters"] = report.parameters;
  if (hashed) {
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
    for (const std::string& name : names) {
      SALA_ASSIGN_OR_RETURN(record["sha256"][name], FileSha256(directory + "/" + name));
    }
  }
  return WriteFileAtomically(directory + "/export.json", record.dump(2) + "\n");
}

Status WriteTexts(const std::string& directory, const Texts& texts) {
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/config.json", texts.config));
  if (!texts.generation) return OkStatus();
  return WriteFileAtomically(directory + "/" + kGenerationConfig, *texts.generation);
}

// Files, headers and index as the source had them.
Status WriteAsSource(const std::string& directory, const SourceRecord& record,
                     const Weights& weights) {
  for (const auto& [name, header] : record.headers)
    SALA_RETURN_IF_ERROR(WriteSafetensorsAs(directory + "/" + name, header, weights.tensors));
  if (record.index.empty()) return OkStatus();
  return WriteFileAtomically(directory + "/" + SafetensorsModel::kIndexName, record.index);
}

// In generation_config.json, whoever wrote it.
Status AddTurnEnds(const std::string& directory, const model::ModelConfig& config,
                   const data::Tokenizer& tokenizer) {
  const std::string path = directory + "/" + kGenerationConfig;
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const std::string with = WithTurnEnds(text, config, tokenizer);
  return with == text ? OkStatus() : WriteFileAtomically(path, with);
}

// Everything, in a directory nobody looks at yet.
Status WriteFolder(const std::string& directory, const Weights& weights, const Texts& texts,
                   const model::ModelConfig& config, const data::Tokenizer* tokenizer,
                   const nlohmann::json& source, const ExportOptions& options,
                   const std::optional<BaseFolder>& base, ExportReport* report) {
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  if (report->as_source) {
    SALA_RETURN_IF_ERROR(WriteAsSource(directory, *options.source_form, weights));
  } else {
    SALA_RETURN_IF_ERROR(
        WriteSafetensorsModel(directory, weights.tensors, options.max_shard_bytes));
  }
  if (!options.tokenizer_directory.empty() && (report->as_source || tokenizer == nullptr)) {
    SALA_RETURN_IF_ERROR(data::CopyTokenizerFiles(options.tokenizer_directory, directory).status());
  } else if (tokenizer != nullptr) {
    SALA_RETURN_IF_ERROR(tokenizer->SaveTo(directory));
  }
  SALA_RETURN_IF_ERROR(WriteTexts(directory, texts));
  if (options.verify) {
    SALA_RETURN_IF_ERROR(VerifyExport(directory, weights, texts));
    report->verified = true;
  }
  if (base) {
    SALA_ASSIGN_OR_RETURN(report->taken, TakeFromBase(*base, directory));
    report->left_out = base->left_out;
  }
  if (options.chat && tokenizer != nullptr)
    SALA_RETURN_IF_ERROR(AddTurnEnds(directory, config, *tokenizer));
  if (options.engine) SALA_RETURN_IF_ERROR(CheckEngineFolder(*options.engine, directory));
  const std::string fingerprint =
      tokenizer != nullptr ? tokenizer->fingerprint() : options.tokenizer_fingerprint;
  SALA_RETURN_IF_ERROR(WriteExportRecord(
      directory, {{"source", source}, {"tokenizer_fingerprint", fingerprint}}, *report,
      /*hashed=*/true));
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

// Puts `temporary` in the place of `directory`, which is absent, empty or to be replaced. At every
// moment there is a whole folder where there was one.
Status MoveIntoPlace(const std::string& temporary, const std::string& directory) {
  if (PathExists(directory)) {
    SALA_RETURN_IF_ERROR(ExchangePaths(temporary, directory));
    SALA_RETURN_IF_ERROR(RemoveTree(temporary));  // what was there
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

// "" where the folder the model came from still says what the model computes and is stored in the
// wanted type: its configuration gives this model, its headers name exactly these tensors. Else why
// not.
std::string SourceProblem(const SourceRecord& record, const model::ModelConfig& config,
                          const nlohmann::json& hf_config, const HfConfigOptions& hf,
                          const std::vector<model::ParameterSpec>& specs,
                          const ExportOptions& options) {
  const nlohmann::json json =
      nlohmann::json::parse(record.config, nullptr, /*allow_exceptions=*/false);
  const auto said = ModelConfigFromHf(json, "config.json");
  if (!said.ok()) return "its config.json is not read";
  if (said->tie_word_embeddings && !config.tie_word_embeddings)
    return "the head was untied from the embedding (import --keep-tied keeps it)";
  const auto said_json = HfConfig(*said, hf);
  if (!said_json.ok() || *said_json != hf_config) return "the model is another one than it says";
  const auto tensors = record.Tensors();
  if (!tensors || tensors->size() != specs.size()) return "it has other tensors";
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const model::ParameterSpec& spec : specs) shapes[spec.name] = spec.shape;
  for (const SourceRecord::Tensor& tensor : *tensors) {
    const auto at = shapes.find(tensor.name);
    if (at == shapes.end() || at->second != tensor.shape) return "it has other tensors";
    if (options.dtype && *options.dtype != tensor.type)
      return "--dtype is another than that of its weights";
  }
  return "";
}

// What --base and --engine change in config.json: where the model's code is.
void SetAutoMap(const std::optional<BaseFolder>& base, std::optional<Engine> engine,
                nlohmann::json* config, std::string* text) {
  const bool add = base && base->auto_map.is_object() && !config->contains("auto_map");
  if (add) (*config)["auto_map"] = base->auto_map;
  const bool remove = engine == Engine::kSglang && (*config)["model_type"] == "minicpm_sala" &&
                      config->contains("auto_map") && (*config)["auto_map"].is_object() &&
                      (*config)["auto_map"].contains(kAutoConfig);
  if (remove) (*config)["auto_map"].erase(kAutoConfig);
  if (!add && !remove) return;
  // In the order of the keys that it has.
  auto ordered = nlohmann::ordered_json::parse(*text);
  ordered["auto_map"] = (*config)["auto_map"];
  *text = ordered.dump(2) + "\n";
}

Status Place(const std::string& temporary, const std::string& directory, Status written) {
  if (written.ok()) written = MoveIntoPlace(temporary, directory);
  if (!written.ok())
    static_cast<void>(RemoveTree(temporary));  // the first error is the one to report
  return written;
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
  const SourceRecord* record = options.source_form;
  const std::optional<WeightType> source_type = record == nullptr ? std::nullopt : record->type();
  const WeightType dtype = options.dtype.value_or(source_type.value_or(WeightType::kBF16));
  const HfConfigOptions hf{.dtype = dtype, .eos_token_ids = EosIds(config, tokenizer)};
  SALA_ASSIGN_OR_RETURN(const nlohmann::json hf_config, HfConfig(config, hf));
  SALA_RETURN_IF_ERROR(CheckConfigRoundTrip(config, hf_config, hf));
  if (config.has_lightning() && config.mixer(0) != model::MixerType::kSoftmax) {
    SALA_LOG(Warn) << "layer 0 is a linear layer: the published model code counts cached tokens in "
                      "layer 0 and needs a softmax layer there";
  }
  ExportReport report{.tensors = static_cast<int64_t>(params.specs().size()),
                      .parameters = params.parameters(),
                      .dtype = dtype,
                      .config = hf_config};
  if (record != nullptr) {
    report.source_problem = SourceProblem(*record, config, hf_config, hf, params.specs(), options);
    report.as_source = report.source_problem.empty();
  }
  std::map<std::string, WeightType> types;
  Texts texts{.config = hf_config.dump(2) + "\n",
              .generation = HfGenerationConfig(config, hf).dump(2) + "\n"};
  if (report.as_source) {
    const auto tensors = record->Tensors();
    for (const SourceRecord::Tensor& tensor : *tensors) types[tensor.name] = tensor.type;
    texts = {.config = record->config, .generation = record->generation_config};
    report.config = nlohmann::json::parse(record->config);
  }
  std::optional<BaseFolder> base;
  if (!options.base.empty()) {
    SALA_ASSIGN_OR_RETURN(
        base, ReadBase(options.base, hf_config["model_type"].get<std::string>(), tokenizer));
  }
  SetAutoMap(base, options.engine, &report.config, &texts.config);
  if (options.engine) {
    SALA_RETURN_IF_ERROR(CheckEngineConfig(*options.engine, report.config,
                                           base ? base->files : std::vector<std::string>()));
  }
  // Else WriteFolder adds the ends of a turn.
  if (options.chat && !texts.generation && !(base && base->Has(kGenerationConfig)))
    texts.generation = HfGenerationConfig(config, hf).dump(2) + "\n";
  SALA_ASSIGN_OR_RETURN(const Weights weights, ConvertWeights(params, [&](const std::string& name) {
                          return report.as_source ? types.at(name) : dtype;
                        }));
  report.bytes = weights.bytes;
  const std::string temporary = directory + ".tmp-export";
  SALA_RETURN_IF_ERROR(RemoveTree(temporary));
  SALA_RETURN_IF_ERROR(Place(
      temporary, directory,
      WriteFolder(temporary, weights, texts, config, tokenizer, source, options, base, &report)));
  return report;
}

StatusOr<ExportReport> ExportShapes(const model::ModelConfig& config,
                                    const std::vector<int64_t>& stop_token_ids,
                                    const ExportOptions& options) {
  const std::string directory = WithoutTrailingSlashes(options.directory);
  SALA_ASSIGN_OR_RETURN(const std::string obstacle, Obstacle(directory, options.force));
  if (!obstacle.empty()) return MakeError(ExitCode::kIo, "EXP-EXISTS", obstacle);
  const WeightType dtype = options.dtype.value_or(WeightType::kBF16);
  const HfConfigOptions hf{.dtype = dtype, .eos_token_ids = stop_token_ids};
  SALA_ASSIGN_OR_RETURN(const nlohmann::json hf_config, HfConfig(config, hf));
  SALA_RETURN_IF_ERROR(CheckConfigRoundTrip(config, hf_config, hf));
  const std::vector<model::ParameterSpec> specs = model::ParameterSpecs(config);
  const auto type_of = [&](const std::string&) { return dtype; };
  ExportReport report{.tensors = static_cast<int64_t>(specs.size()),
                      .bytes = BytesOf(specs, type_of),
                      .dtype = dtype};
  for (const model::ParameterSpec& spec : specs) report.parameters += spec.numel;
  const std::string temporary = directory + ".tmp-export";
  SALA_RETURN_IF_ERROR(RemoveTree(temporary));
  const auto write = [&]() -> Status {
    SALA_RETURN_IF_ERROR(MakeDirectories(temporary));
    SALA_RETURN_IF_ERROR(
        WriteSafetensorsModel(temporary, TensorsOf(specs, type_of), options.max_shard_bytes));
    SALA_RETURN_IF_ERROR(
        WriteTexts(temporary, {.config = hf_config.dump(2) + "\n",
                               .generation = HfGenerationConfig(config, hf).dump(2) + "\n"}));
    // Hashes of holes would take as long as those of weights and say nothing.
    SALA_RETURN_IF_ERROR(
        WriteExportRecord(temporary, {{"shapes_only", true}}, report, /*hashed=*/false));
    return FsyncDirectory(temporary);
  };
  SALA_RETURN_IF_ERROR(Place(temporary, directory, write()));
  return report;
}

}  // namespace sala::recipes
