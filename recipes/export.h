// A model as a Hugging Face folder that other programs load.
//
//   DIR/config.json  generation_config.json  model.safetensors (or shards with an index)  tokenizer
//   files  export.json
//
// Weights are rounded to nearest-even once. A model that came from such a folder and still computes
// what the folder's config.json says is written as that folder was: same files, same headers, same
// texts, other values. The folder appears whole or not at all: it is written under a temporary name
// beside its place and renamed. Layout: docs/formats.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "core/status.h"
#include "data/tokenizer.h"
#include "model/config.h"
#include "model/parameters.h"
#include "nlohmann/json.hpp"
#include "recipes/export_engine.h"
#include "recipes/hf_config.h"
#include "recipes/hf_folder.h"

namespace sala::recipes {

struct ExportOptions {
  std::string directory;
  std::optional<WeightType> dtype = {};  // nullopt: of the folder the model came from, else bf16
  bool verify = false;  // read everything back and compare bits before the folder gets its name
  bool force = false;   // replace an exported model that is there
  int64_t max_shard_bytes = kMaxShardBytes;
  std::string tokenizer_fingerprint = {};  // recorded where no tokenizer is written; "": not known
  // Its files are copied where the source's form is kept or the tokenizer is of a form that is not
  // read; "": none.
  std::string tokenizer_directory = {};
  const SourceRecord* source_form = nullptr;  // of the folder the model came from, if it did
  std::optional<Engine> engine = {};          // that must be able to load it
  std::string base = {};  // model folder whose other files are taken over; "": none
  // The model was trained on chats here: it ends a turn with the marker of its turns, whatever the
  // folder it came from stops at.
  bool chat = false;
};

struct ExportReport {
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t bytes = 0;  // of the weights
  WeightType dtype = WeightType::kBF16;
  bool as_source = false;           // in the form of the folder the model came from
  std::string source_problem = {};  // why not, where it came from one
  bool verified = false;
  std::vector<std::string> taken = {}, left_out = {};  // files of options.base
  nlohmann::json config = {};                          // config.json as it was written
};

// `tokenizer` may be null (none is written); its fingerprint goes into export.json. `source` goes
// into export.json: what the weights are
// ({path, save_id, step}). Errors: EXP-EXISTS (74), EXP-QKNORM, EXP-TOKENIZER (a vocabulary larger
// than the model's), EXP-NUMBERS (a weight is not finite), EXP-VERIFY (what was read back differs),
// EXP-FIELD (config.json would not give this model back), EXP-ENGINE, EXP-BASE (65).
StatusOr<ExportReport> ExportModel(const model::ModelConfig& config,
                                   const model::ParameterStore& params,
                                   const data::Tokenizer* tokenizer, const nlohmann::json& source,
                                   const ExportOptions& options);

// What ExportModel would write of such a model, with true headers and file sizes and holes for
// values: neither memory nor disk holds them. `stop_token_ids` end a generation (empty: eos).
// Errors as above.
StatusOr<ExportReport> ExportShapes(const model::ModelConfig& config,
                                    const std::vector<int64_t>& stop_token_ids,
                                    const ExportOptions& options);

}  // namespace sala::recipes
