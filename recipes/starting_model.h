// The shapes that a run starts with, before any weight is read.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/status.h"
#include "data/tokenizer.h"
#include "model/config.h"
#include "recipes/config.h"

namespace sala::recipes {

enum class MissingModel : uint8_t {
  kRefuse,    // a run: what `init_from.path` names must be there
  kDescribe,  // a plan: `init_from.model` stands for it where nothing is there
};

// Size of the tokenizer's vocabulary, asked for only where a new model takes it from there.
using VocabularySize = std::function<StatusOr<int64_t>()>;

// Of a stage with `model` or `init_from`, resolved. CKPT-NONE (65) where there is no
// model, the errors of reading one, and CFG-MODEL (78) where it is not the one that
// `init_from.model` describes.
StatusOr<model::ModelConfig> StartingConfig(const StageConfig& stage, MissingModel missing,
                                            const VocabularySize& vocabulary);

// nullptr where there is nothing at the path yet; the errors of LoadTokenizer for what is there.
StatusOr<std::unique_ptr<data::Tokenizer>> TokenizerIfThere(const std::string& path);

}  // namespace sala::recipes
