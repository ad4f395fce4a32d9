// A trained model as a Hugging Face folder that inference engines load, and such folders back as
// models.
//
//   DIR/config.json  generation_config.json  model.safetensors (or shards with an index)  tokenizer
//   files  export.json
//
// Weights are rounded to nearest-even bf16 once (or written as they are, f32). The folder appears
// whole or not at all: it is written under a temporary name beside its place and renamed. Layout:
// docs/formats.md.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/status.h"
#include "data/tokenizer.h"
#include "model/config.h"
#include "model/parameters.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

struct ExportOptions {
  std::string directory;
  DType dtype = DType::kBF16;  // or kF32
  bool verify = false;  // read everything back and compare bits before the folder gets its name
  bool force = false;   // replace an exported model that is there
  int64_t max_shard_bytes = int64_t{5} * 1000 * 1000 * 1000;
  std::string tokenizer_fingerprint = {};  // recorded where no tokenizer is written; "": not known
};

struct ExportReport {
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t bytes = 0;  // of the weights
  bool verified = false;
};

// `tokenizer` may be null (none is written); its fingerprint goes into export.json. `source` goes
// into export.json: what the weights are
// ({path, save_id, step}). Errors: EXP-EXISTS (74), EXP-QKNORM, EXP-TOKENIZER (a vocabulary larger
// than the model's), EXP-NUMBERS (a weight is not finite), EXP-VERIFY (what was read back differs),
// EXP-FIELD (config.json would not give this model back) (65).
StatusOr<ExportReport> ExportModel(const model::ModelConfig& config,
                                   const model::ParameterStore& params,
                                   const data::Tokenizer* tokenizer, const nlohmann::json& source,
                                   const ExportOptions& options);

// The tokenizer a command works with: `named` if not empty, else the copy in the run directory that
// holds the checkpoint (CHECKPOINT/../../tokenizer), else the files of an exported folder itself.
// EXP-TOKENIZER (66) when there is none.
StatusOr<std::string> TokenizerPathFor(const std::string& model_path, const std::string& named);

struct HfFolder {
  model::ModelConfig config;
  model::ParameterStore params;
  std::string tokenizer_fingerprint;  // of export.json; "" where there is none
};

// Reads a folder of model_type minicpm_sala, minicpm, llama or qwen3. Tied embeddings are untied:
// the head becomes a copy of the embedding. An export.json beside the weights says which tokenizer
// they were trained with. Errors: FILE-MISSING (66), IMP-* and ST-* (65);
// IMP-MISSING and IMP-EXTRA list tensors the configuration asks for or has no place for.
StatusOr<HfFolder> LoadHfFolder(const std::string& directory);

// Its config.json alone.
StatusOr<model::ModelConfig> HfFolderConfig(const std::string& directory);

}  // namespace sala::recipes
