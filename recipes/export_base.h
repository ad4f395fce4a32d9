// The files that a published model folder has beside its weights and that an export takes over
// (--base): the model's own Python code, the licence, generation_config.json, and the tokenizer's
// companions where it is the same tokenizer.
#pragma once

#include <string>
#include <vector>

#include "core/status.h"
#include "data/tokenizer.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

inline constexpr char kGenerationConfig[] = "generation_config.json";

struct BaseFolder {
  std::string directory;
  std::vector<std::string> files;     // that may be taken, sorted
  std::vector<std::string> left_out;  // those of another tokenizer
  nlohmann::json auto_map;            // of its config.json, where it has Python code; else null
  bool has_code() const;
  bool Has(const std::string& name) const;  // among `files`
};

// `model_type`: of the model that is exported, which the folder must be of. `tokenizer` may be
// null. FILE-MISSING (66), EXP-BASE (65): no model folder, or one of another kind of model.
StatusOr<BaseFolder> ReadBase(const std::string& directory, const std::string& model_type,
                              const data::Tokenizer* tokenizer);

// Those that are not in `to` yet, copied byte for byte; returns their names. A chat template is
// there also where tokenizer_config.json has it. FILE-WRITE (74).
StatusOr<std::vector<std::string>> TakeFromBase(const BaseFolder& base, const std::string& to);

}  // namespace sala::recipes
