// The directory of an evaluation while it is made: every task and length is there as soon as it is
// measured, and an evaluation that was cut off goes on behind the last one that is whole.
//
//   DIR/settings.json       everything that decides the numbers; written first
//   DIR/TASK-LENGTH.jsonl   a line for each sample; whole or not there
//   DIR/summary.part.jsonl  the lines of the summary so far; gone when summary.jsonl is there
//   DIR/depths.svg, DIR/summary.jsonl   written last (recipes/eval_report.h)
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/tokenizer.h"
#include "nlohmann/json.hpp"
#include "parallel/mesh.h"
#include "recipes/eval.h"
#include "recipes/eval_report.h"

namespace sala::recipes {

// How a model is measured, as far as it decides bits.
struct EvalUse {
  std::string model_path;
  bool sparse_attention = false;
  int64_t cp = 1, tp = 1;
  std::string device = "cpu";
};

// {"tasks", "lengths_tokens", "depths", "samples", "seed", "chat", "prompts", "haystack",
// "held_out_seed", "held_out_fraction", "tokenizer", "model", "checkpoint", "sparse_attention",
// "cp", "tp", "device"}. What is in files (prompts, haystack, tokenizer, model) is named by a
// fingerprint: of a checkpoint its save_id, of a folder a hash of config.json and of pieces of the
// weights. FILE-MISSING (66), FILE-READ (74).
StatusOr<nlohmann::ordered_json> EvalSettings(const EvalRequest& request,
                                              const data::Tokenizer& tokenizer, const EvalUse& use);

// "samples: 5 and 2": the first setting, by name, in which two differ; "" where they are the same.
std::string SettingsDifference(const nlohmann::json& a, const nlohmann::json& b);
// DIR/settings.json; null where there is none or it is no JSON object.
nlohmann::json ReadSettings(const std::string& directory);

// kForeign: files of these names are there, but settings.json has no tasks, samples and model.
enum class EvalState : uint8_t { kNothing, kForeign, kUnfinished, kComplete };
EvalState StateOf(const std::string& directory);
// EVAL-EXISTS (74), of kForeign.
Status ForeignError(const std::string& directory);

// Whether the evaluation there is complete and of these settings. Layout, device and the path of
// the model do not count then: its numbers are as good as those of another.
bool IsCompleteWith(const std::string& directory, const nlohmann::ordered_json& settings);

// The files of an evaluation, and no others; its summary may be damaged. EVAL-EXISTS (74): it is
// none. FILE-WRITE (74).
Status RemoveEvaluation(const std::string& directory);

struct EvalTarget {
  std::string directory;
  nlohmann::ordered_json settings = {};
  int64_t depths = 10;
  EvalIdentity identity = {};
  // Of an evaluation that is there, complete or with other settings. One that is unfinished and has
  // these settings is always gone on with.
  bool replace = false;
};

// Of one rank. Add in the order of the summary, then Finish.
class EvalWriter {
 public:
  // EVAL-EXISTS (74) with the setting that differs, FILE-WRITE (74).
  static StatusOr<EvalWriter> Open(const EvalTarget& target);

  // Tasks and lengths that are done: "passkey-512".
  const std::vector<std::string>& done() const { return done_; }
  Status Add(const TaskResult& result);
  Status Finish();

 private:
  explicit EvalWriter(EvalTarget target) : target_(std::move(target)) {}
  void ReadParts();

  EvalTarget target_;
  std::vector<std::string> done_;
  std::vector<nlohmann::ordered_json> summary_;
};

// Measures what is missing and writes it. Collective; `target` matters on rank 0. `between` is
// called on every rank after each task and length that was written; an error ends the evaluation,
// which can go on later.
Status MakeEvaluation(const parallel::Mesh& mesh, const Evaluation& evaluation,
                      const ScoreDocument& score, const EvalTarget& target,
                      const std::function<Status()>& between = nullptr);

}  // namespace sala::recipes
