#include "recipes/model_tokenizer.h"

#include "core/checkpoint.h"
#include "core/file.h"
#include "data/tokenizer_files.h"
#include "recipes/hf_folder.h"

namespace sala::recipes {

StatusOr<std::string> TokenizerPathFor(const std::string& model_path, const std::string& named) {
  if (!named.empty()) return named;
  const std::string in_run = model_path + "/../../tokenizer";
  if (PathExists(model_path + "/manifest.json") && IsDirectory(in_run)) return in_run;
  for (const char* file :
       {data::kHfTokenizerFile, data::kSentencePieceFile, data::kByteTokenizerFile}) {
    if (PathExists(model_path + "/" + file)) return model_path;
  }
  if (!PathExists(model_path + "/manifest.json") && !PathExists(model_path + "/config.json")) {
    const bool run = IsDirectory(model_path + "/checkpoints");
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     Printable(model_path) +
                         (run ? ": is a run directory; name one of its checkpoints, which sala "
                                "ckpt list shows"
                              : ": holds neither a checkpoint (manifest.json) nor an exported "
                                "model (config.json)"));
  }
  return MakeError(
      ExitCode::kNoInput, "EXP-TOKENIZER",
      Printable(model_path) +
          ": no tokenizer in the run directory or beside the weights; name one with --tokenizer");
}

StatusOr<std::string> TokenizerFingerprintAt(const std::string& model_path) {
  if (IsHfFolder(model_path)) {
    SALA_ASSIGN_OR_RETURN(const ModelFolder folder, ModelFolder::Open(model_path));
    return folder.tokenizer_fingerprint();
  }
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(model_path));
  return checkpoint.info().tokenizer_fingerprint;
}

Status CheckTokenizer(const std::string& model_path, const std::string& fingerprint,
                      const data::Tokenizer& tokenizer) {
  if (fingerprint.empty() || fingerprint == tokenizer.fingerprint()) return OkStatus();
  constexpr size_t kShown = 12;
  return MakeError(ExitCode::kData, "TOK-MISMATCH",
                   Printable(model_path) + ": trained with tokenizer " +
                       fingerprint.substr(0, kShown) + ", found " +
                       tokenizer.fingerprint().substr(0, kShown) +
                       "; name the right one with --tokenizer");
}

}  // namespace sala::recipes
