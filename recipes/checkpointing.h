// When a run saves and what goes into a checkpoint; loading models from checkpoints and exported
// folders.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/checkpoint.h"
#include "model/model.h"
#include "recipes/optimizer.h"
#include "recipes/session.h"
#include "recipes/source_record.h"

namespace sala::recipes {

// Where in the pipeline a checkpoint was taken. A stage has one phase ("train"), HALO several
// ("align", "score", ...).
struct StagePosition {
  std::string stage;
  int64_t stage_index = 0;
  std::string phase = "train";
  int64_t phase_step = 0;    // steps of the phase that are done
  bool stage_final = false;  // the stage's result: what the next stage starts from
};

struct SaveRequest {
  StagePosition position;
  const model::ModelConfig* model = nullptr;
  const model::ParameterStore* params = nullptr;
  const Optimizer* optimizer = nullptr;  // may be null (stage results that nothing continues from)
  nlohmann::json trainer;   // counters and cursor; "updates" is added when there is an optimizer
  std::string config_yaml;  // the stage, resolved
  nlohmann::json parent;    // {path, save_id} or null
  CheckpointConfig policy;
};

// Collective. Writes checkpoints/step-NNNNNNNNN of session.global_step (a save that is not the end
// of a training step, such as an assembled model, advances global_step by one first, so that no two
// checkpoints share a number), prunes old ones. A failed save is logged and counted; CKPT-SAVE (74)
// is returned only after policy.max_failures in a row, or at once for a stage-final save or when
// `must_succeed`. Returns the directory ("" after a tolerated failure).
StatusOr<std::string> SaveCheckpoint(Session& session, const SaveRequest& request,
                                     bool must_succeed = false);

StagePosition PositionOf(const Checkpoint& checkpoint);
StatusOr<model::ModelConfig> ModelConfigOf(const Checkpoint& checkpoint);

// Fills every parameter of the store; strict: a tensor that is missing, extra or of another shape
// is CKPT-TENSOR with the list (`allow_missing` excepted, which keeps what the store holds).
Status LoadParameters(const Checkpoint& checkpoint, model::ParameterStore& params,
                      const std::function<bool(const std::string&)>& allow_missing = nullptr);

// A model to start from: a checkpoint directory, or a Hugging Face folder written by `sala export`
// (or of the same family).
struct LoadedModel {
  model::ModelConfig config;
  model::ParameterStore params;
  std::optional<Checkpoint> checkpoint;  // when it came from one
  nlohmann::json origin;                 // {path, save_id} for the parent field
  std::string tokenizer_fingerprint;     // that it was trained with; "": not known
  std::optional<SourceRecord> source;    // of the model folder the weights came from, if they did
};
// The model at this path, a checkpoint or a folder, without its weights.
StatusOr<model::ModelConfig> ModelConfigAt(const std::string& path);

// How a model's parameters are laid out in host memory; empty: whole. CFG-MESH (78) when the model
// cannot be cut like that.
using StoreLayout =
    std::function<StatusOr<model::ParameterStore>(const model::ModelConfig& config)>;
StatusOr<LoadedModel> LoadModel(const std::string& path, const StoreLayout& layout = nullptr);

// This rank's part of the parameters: its tensor shard, with ZeRO-3 its pieces of that, unless
// `whole`. The mesh must outlive the layout.
StoreLayout LayoutOn(const parallel::Mesh& mesh, bool whole = false);

// The stage-final checkpoint of the stage before `stage_index` in this run, or the newest one of
// it: CKPT-NONE if there is none.
StatusOr<std::string> StageResult(Session& session, int64_t stage_index);

}  // namespace sala::recipes
