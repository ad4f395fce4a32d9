#include "recipes/starting_model.h"

#include <sstream>
#include <string>

#include "core/file.h"
#include "recipes/checkpointing.h"

namespace sala::recipes {
namespace {

// CFG-MODEL unless both compute the same. Token ids, the length written to config.json and the
// range of initial weights change nothing that is trained from there.
Status CheckDescription(const model::ModelConfig& described, const model::ModelConfig& found,
                        const std::string& path) {
  const auto compared = [](model::ModelConfig config) {
    config.bos_token_id = config.eos_token_id = config.pad_token_id = -1;
    config.max_position_embeddings = 1;
    config.initializer_range = 0;
    return EmitConfig(config);
  };
  std::istringstream expected(compared(described));
  std::istringstream actual(compared(found));
  std::string expected_line;
  std::string line;
  while (std::getline(expected, expected_line) && std::getline(actual, line)) {
    if (expected_line == line) continue;
    return MakeError(ExitCode::kConfig, "CFG-MODEL",
                     path + ": the model there has '" + Printable(line) +
                         "', init_from.model expects '" + Printable(expected_line) +
                         "'; name the right model, or correct or remove init_from.model");
  }
  return OkStatus();
}

}  // namespace

StatusOr<model::ModelConfig> StartingConfig(const StageConfig& stage, MissingModel missing,
                                            const VocabularySize& vocabulary) {
  if (stage.model) {
    model::ModelConfig config = *stage.model;
    if (config.vocab_size == 0) {
      SALA_ASSIGN_OR_RETURN(config.vocab_size, vocabulary());
    }
    SALA_RETURN_IF_ERROR(config.Resolve());
    return config;
  }
  const InitConfig& from = *stage.init_from;
  if (!from.model) return ModelConfigAt(from.path);
  model::ModelConfig described = *from.model;
  SALA_RETURN_IF_ERROR(Annotate(described.Resolve(), "init_from"));
  if (missing == MissingModel::kDescribe && !PathExists(from.path)) return described;
  SALA_ASSIGN_OR_RETURN(model::ModelConfig found, ModelConfigAt(from.path));
  SALA_RETURN_IF_ERROR(CheckDescription(described, found, from.path));
  return found;
}

StatusOr<std::unique_ptr<data::Tokenizer>> TokenizerIfThere(const std::string& path) {
  if (path != "bytes" && !PathExists(path)) return std::unique_ptr<data::Tokenizer>();
  return data::LoadTokenizer(path);
}

}  // namespace sala::recipes
