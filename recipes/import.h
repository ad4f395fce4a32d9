// A Hugging Face folder as a checkpoint of step 0: what a stage starts from and every command
// takes. Nothing is added to the model: a full-attention folder becomes a full-attention teacher.
//
//   RUN/checkpoints/step-000000000/   weights in float32, source.json (recipes/source_record.h)
//   RUN/tokenizer/                    the folder's tokenizer files, byte for byte
//
// Memory: the largest tensor, or a gigabyte where tensors are smaller.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "model/config.h"
#include "recipes/hf_folder.h"

namespace sala::recipes {

// All tensors of one name with the number of the layer left out, one shape and one type.
struct TensorKindReport {
  std::string kind;  // "model.layers.*.self_attn.q_proj.weight"
  std::string type;  // as stored in the folder: "BF16"
  std::vector<int64_t> shape;
  int64_t tensors = 0;
  int64_t elements = 0;
  double mean = 0, standard_deviation = 0, absolute_max = 0;  // of all elements
};

struct ImportOptions {
  std::string directory;  // the folder
  std::string run;        // the run directory to make
  ModelFolderOptions folder = {};
};

struct ImportReport {
  std::string model_type;
  model::ModelConfig config;
  bool untied = false;  // the head is a copy of the embedding
  std::vector<TensorKindReport> kinds;
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t rounded = 0;  // values of F64 tensors that are no float32 numbers
  std::vector<std::string> tokenizer_files;
  std::string checkpoint;
};

// Configuration and headers alone; numbers of the kinds stay 0. Writes nothing. Errors of
// ModelFolder::Open.
StatusOr<ImportReport> CheckFolder(const std::string& directory, const ModelFolderOptions& options);

// Everything; the checkpoint it wrote has passed its deep verification. Errors (65): IMP-NUMBERS (a
// weight is not finite, or too large for float32), IMP-EMPTY, IMP-EXTRA and those of
// ModelFolder::Open; IMP-EXISTS (74): the run directory holds checkpoints or a tokenizer, or is
// itself a model folder; CKPT-*. What an interrupted import of the same folder left is no
// hindrance.
StatusOr<ImportReport> ImportFolder(const ImportOptions& options);

}  // namespace sala::recipes
