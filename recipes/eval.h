// Evaluation by teacher forcing: one forward pass over prompt and expected answer. A sample is
// right when the arg-max (lowest id on ties) is the answer's token at every position of the answer,
// which is when greedy decoding would have written it (docs/evaluation.md).
//
//   SALA_ASSIGN_OR_RETURN(Evaluation evaluation, Evaluation::Open(request, tokenizer));
//   SALA_ASSIGN_OR_RETURN(auto results, evaluation.Run(mesh, ScoreWith(ctx, arena, model,
//   options)));
//
// Sample i is dealt to dp rank i mod DP; prompts do not depend on ranks, and neither do the bits of
// results with dp alone (cp and tp sum in another order).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/synthetic.h"
#include "data/tokenizer.h"
#include "model/loss.h"
#include "parallel/mesh.h"
#include "recipes/eval_config.h"

namespace sala::recipes {

// What a model computes for one document: the losses of its tokens under each of these label sets
// [T], this rank's part of them (model/loss.h). All ranks call it equally often, with an empty
// batch where they have no sample.
using ScoreDocument = std::function<std::vector<kernels::CrossEntropyResult>(
    const model::Batch& batch, std::span<const std::vector<int32_t>> labels)>;

// Everything must outlive the function.
ScoreDocument ScoreWith(const Context& ctx, Arena& arena, const model::Model& model,
                        const model::RunOptions& options);

struct EvalRequest {
  EvalConfig config;                         // tasks, lengths, samples, seed, haystack
  std::optional<data::Haystack::Part> part;  // of the haystack's documents; nullopt: all
  std::string prompts;                       // JSON lines of the user's own; "": none
};

// One document that is measured.
struct EvalPart {
  model::Batch batch;
  std::vector<std::vector<int32_t>> labels;
};

struct EvalSample {
  std::vector<EvalPart> parts;
  double depth = data::kNoDepth;
  std::string hash;  // of the prompt, 16 hex digits
  std::string id;    // of the user's own prompts
};

// The samples of one task at one length.
class EvalSource {
 public:
  EvalSource() = default;
  EvalSource(const EvalSource&) = delete;
  EvalSource& operator=(const EvalSource&) = delete;
  virtual ~EvalSource() = default;

  virtual const std::string& task() const = 0;
  virtual int64_t length() const = 0;
  virtual int64_t size() const = 0;
  virtual StatusOr<EvalSample> Make(int64_t index) const = 0;

  // Of a source of losses: what each label set of each part measures, in order. Empty: samples have
  // one part with one set, the answer.
  struct Range {
    int64_t from, to;
  };
  virtual std::vector<Range> ranges() const { return {}; }
  // How many label sets each part of a sample has.
  virtual std::vector<size_t> sets() const { return {1}; }
};

struct SampleResult {
  int64_t index = 0;
  double depth = data::kNoDepth;
  bool right = false;          // of losses: false
  double log_probability = 0;  // mean per answer token, nats; of losses: per token measured
  std::string hash, id;
};

struct LossBucket {
  int64_t from = 0, to = 0;
  double loss = 0;  // mean, nats per token
  int64_t count = 0;
};

struct TaskResult {
  std::string task;
  int64_t length = 0;
  std::vector<SampleResult> samples;
  std::vector<LossBucket> buckets;  // tasks of losses only

  bool of_losses() const { return !buckets.empty(); }
  int64_t right() const;
  double share() const;
  double mean_log_probability() const;
};

// What may be said between the tasks of an evaluation, on every rank alike.
struct EvalHooks {
  std::function<bool(const std::string& task, int64_t length)> skip = nullptr;  // measured already
  // After each task and length; an error ends the run.
  std::function<Status(const TaskResult&)> done = nullptr;
};

class Evaluation {
 public:
  // Reads the haystack and the prompts and makes the first sample of every task and length, so that
  // what cannot work shows before anything is computed. EVAL-TASK, EVAL-LENGTH, EVAL-HAYSTACK,
  // EVAL-BOUNDARY (78), EVAL-PROMPTS (65). `tokenizer` must outlive it.
  static StatusOr<Evaluation> Open(const EvalRequest& request, const data::Tokenizer& tokenizer);

  // Collective. The results of what was not skipped.
  StatusOr<std::vector<TaskResult>> Run(const parallel::Mesh& mesh, const ScoreDocument& score,
                                        const EvalHooks& hooks = {}) const;

  const std::vector<std::unique_ptr<EvalSource>>& sources() const { return sources_; }

 private:
  Evaluation() = default;
  std::unique_ptr<data::Haystack> filler_, text_;
  std::vector<std::unique_ptr<EvalSource>> sources_;
};

// Collective: the result of one source.
StatusOr<TaskResult> MeasureSource(const parallel::Mesh& mesh, const EvalSource& source,
                                   const ScoreDocument& score);

}  // namespace sala::recipes
