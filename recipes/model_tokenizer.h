// Which tokenizer goes with a trained model.
#pragma once

#include <string>

#include "core/status.h"
#include "data/tokenizer.h"

namespace sala::recipes {

// The tokenizer a command works with: `named` if not empty, else the copy in the run directory that
// holds the checkpoint (CHECKPOINT/../../tokenizer), else the files of an exported folder itself.
// EXP-TOKENIZER (66) when there is none.
StatusOr<std::string> TokenizerPathFor(const std::string& model_path, const std::string& named);

// Of the tokenizer that the model was trained with, a checkpoint or a folder; "": not known.
// Weights are not read.
StatusOr<std::string> TokenizerFingerprintAt(const std::string& model_path);

// TOK-MISMATCH (65) unless it is the tokenizer of this fingerprint, which the model at `model_path`
// was trained with. "": not known, any will do.
Status CheckTokenizer(const std::string& model_path, const std::string& fingerprint,
                      const data::Tokenizer& tokenizer);

}  // namespace sala::recipes
