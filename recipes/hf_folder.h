// Hugging Face model folders as they are read: configuration and headers are checked first, then
// values are read tensor by tensor, each where it is wanted.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "core/status.h"
#include "model/config.h"
#include "model/parameters.h"
#include "recipes/source_record.h"

namespace sala::recipes {

inline constexpr char kEmbeddingName[] = "model.embed_tokens.weight";
inline constexpr char kHeadName[] = "lm_head.weight";

struct ModelFolderOptions {
  std::string arch = "auto";  // or the model_type it must be
  bool keep_tied = false;     // else a head that is the embedding becomes a tensor of its own
};

class ModelFolder {
 public:
  // Reads config.json and the headers of the weights, and holds their names, shapes and types
  // against each other. Errors: FILE-MISSING (66); IMP-ARCH, IMP-FIELD, IMP-QUANT, IMP-BIAS,
  // IMP-MISSING, IMP-SHAPE, IMP-EXTRA and ST-* (65).
  static StatusOr<ModelFolder> Open(const std::string& directory,
                                    const ModelFolderOptions& options = {});

  const std::string& directory() const { return directory_; }
  const model::ModelConfig& config() const { return config_; }  // as the weights are read
  const std::string& model_type() const { return model_type_; }
  bool untied() const { return untied_; }  // the head is read from the embedding
  const std::vector<model::ParameterSpec>& specs() const { return specs_; }
  const std::string& tokenizer_fingerprint() const { return tokenizer_fingerprint_; }
  // Written with --shapes-only: there are headers and no values.
  bool shapes_only() const { return shapes_only_; }

  const SafetensorsEntry& EntryOf(const model::ParameterSpec& spec) const;
  const char* DataOf(const model::ParameterSpec& spec) const;
  // Elements [begin, end) of the part of a tensor that `spec` describes.
  Status Read(const model::ParameterSpec& spec, int64_t begin, int64_t end, float* out) const;
  // What can only be known from values: IMP-EXTRA where a tied model's head is in the file and is
  // not the embedding, IMP-EMPTY of a folder without values.
  Status CheckValues() const;
  std::vector<std::string> TokenizerFiles() const;  // those that are there
  StatusOr<SourceRecord> Record() const;

 private:
  std::string SourceOf(const std::string& name) const;
  Status CheckTensors() const;
  Status ReadExportRecord();

  std::string directory_, config_text_, model_type_, tokenizer_fingerprint_;
  bool tied_ = false, untied_ = false, shapes_only_ = false;
  model::ModelConfig config_;
  std::vector<model::ParameterSpec> specs_;
  SafetensorsModel weights_;
};

// A folder that holds a model and no checkpoint.
bool IsHfFolder(const std::string& path);

struct HfFolder {
  model::ModelConfig config;
  model::ParameterStore params;
  std::string tokenizer_fingerprint;  // of export.json; "" where there is none
  SourceRecord record;
};

// Reads a folder of model_type minicpm_sala, minicpm, llama or qwen3. Tied embeddings are untied:
// the head becomes a copy of the embedding. An export.json beside the weights says which tokenizer
// they were trained with. `layout` (null: whole) makes the store to fill: of a part of the
// parameters nothing else is read.
StatusOr<HfFolder> LoadHfFolder(
    const std::string& directory,
    const std::function<StatusOr<model::ParameterStore>(const model::ModelConfig&)>& layout =
        nullptr);

// The same without its weights: config.json alone.
StatusOr<model::ModelConfig> HfFolderConfig(const std::string& directory);

}  // namespace sala::recipes
