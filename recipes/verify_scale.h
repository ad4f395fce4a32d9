// A pipeline made small, for `sala verify`: everything that says what is computed stays, sizes
// shrink until a core trains it in seconds. Pure functions of the configuration.
//
// Kept: kinds and order of stages, which layers are softmax and which linear (first and last, and
// their share), q/k norm, gates, rotary embedding, the factors of muP (width multiplier, scale_emb,
// scale_depth, initializer_range), tied head, query heads to a key/value head (up to 4), the
// proportions of sparse_config, schedule shapes and rates, optimizer settings, ZeRO stage,
// recompute, packing, document mask, mixture weights, micro-batches to a step (up to 2), the
// settings of HALO.
// Shrunk: hidden size, heads, layers, vocabulary, lengths, steps, tokens. Stages with sparse
// attention get documents of more blocks than a token sees.
// Made: the documents (data::Tokenizer "bytes"), so neither corpus nor tokenizer need exist.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "model/config.h"
#include "recipes/config.h"

namespace sala::recipes {

// Of every training phase of a scaled pipeline, whose runs are stopped in the middle.
constexpr int64_t kVerifySteps = 4;

// A token store to be made for a scaled pipeline.
struct VerifyDataset {
  std::string directory;  // where the scaled configuration looks for it
  bool chat = false;      // with a loss mask
  // Documents: half of them of [8, short_tokens] tokens, the others of [long_min, long_max].
  int64_t short_tokens = 0, long_min = 0, long_max = 0;
};

struct ScaledPipeline {
  PipelineConfig config;     // of one rank; its run.dir is to be given
  model::ModelConfig start;  // of its first stage, resolved
  std::vector<VerifyDataset> datasets;
  // The user's cp and tp of each stage, as far as the scaled model can be cut: 1 or 2.
  std::vector<parallel::MeshConfig> meshes;
  std::vector<std::string> changes;  // what became of what, a line each
};

// `start`: the model the first stage starts from, of its `model` or of what `init_from` names.
// Where weights come from `init_from`, a stage of random weights is put before. `directory` is
// where the datasets will be. CFG-MODEL (78) when the model itself is contradictory.
StatusOr<ScaledPipeline> ScalePipeline(const PipelineConfig& config,
                                       const model::ModelConfig& start,
                                       const std::string& directory);

// Its parts. The model: CFG-MODEL (78) when its sizes do not fit together.
StatusOr<model::ModelConfig> ScaleModel(const model::ModelConfig& config);
kernels::SparseAttentionConfig ScaleSparse(const kernels::SparseAttentionConfig& config);
// Which of `layers` layers are "minicpm4": `types` shrunk to `layers` entries.
std::vector<std::string> ScaleMixers(const std::vector<std::string>& types, int64_t layers);
// Layer numbers (negative: from the end) of a model of `from` layers in one of `to`, each once.
std::vector<int64_t> ScaleLayers(const std::vector<int64_t>& named, int64_t from, int64_t to);

}  // namespace sala::recipes
