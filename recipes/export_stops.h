// Where an exported model stops.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "model/config.h"
#include "recipes/checkpointing.h"

namespace sala::recipes {

// Everything that ends a generation: the model's eos, the tokenizer's, the end of a chat turn.
// `tokenizer` may be null.
std::vector<int64_t> EosIds(const model::ModelConfig& config, const data::Tokenizer* tokenizer);

// Everything that `sala generate` stops at: those, and the eos_token_id of the
// generation_config.json of the folder the model is in or came from, where there is one.
std::vector<int64_t> StopIds(const LoadedModel& model, const std::string& path,
                             const data::Tokenizer& tokenizer);

// A generation_config.json with the ends of a chat turn among its eos_token_id; as it was where
// they are there already.
std::string WithTurnEnds(const std::string& text, const model::ModelConfig& config,
                         const data::Tokenizer& tokenizer);

}  // namespace sala::recipes
