#include "recipes/eval.h"

#include <algorithm>
#include <cmath>

#include "core/json.h"
#include "parallel/communicator.h"
#include "recipes/eval_sources.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

// Loss, right tokens and tokens of each label set, over all ranks that work on the sample.
StatusOr<std::vector<double>> Measure(const parallel::Mesh& mesh, const ScoreDocument& score,
                                      const EvalSample& sample) {
  std::vector<double> numbers;
  for (const EvalPart& part : sample.parts) {
    for (const kernels::CrossEntropyResult& result : score(part.batch, part.labels)) {
      numbers.insert(numbers.end(), {result.loss_sum, static_cast<double>(result.correct),
                                     static_cast<double>(result.targets)});
    }
  }
  if (mesh.sample_group().size() > 1) {
    SALA_RETURN_IF_ERROR(
        mesh.sample_group().AllReduce(std::span<double>(numbers), parallel::Reduce::kSum));
  }
  return numbers;
}

// What a rank without a sample measures, so that the ranks exchange equally often.
EvalSample NoSample(const EvalSource& source) {
  EvalSample sample;
  for (const size_t sets : source.sets()) {
    EvalPart part;
    part.batch.cu_seqlens = {0};
    part.labels.resize(sets);
    sample.parts.push_back(std::move(part));
  }
  return sample;
}

SampleResult ResultOf(const json& row, size_t sets) {
  SampleResult result;
  result.index = row.at(0).get<int64_t>();
  result.depth = row.at(1).get<double>();
  result.hash = row.at(2).get<std::string>();
  result.id = row.at(3).get<std::string>();
  double loss = 0;
  double correct = 0;
  double tokens = 0;
  for (size_t s = 0; s < sets; ++s) {
    loss += row.at(4).at(3 * s).get<double>();
    correct += row.at(4).at(3 * s + 1).get<double>();
    tokens += row.at(4).at(3 * s + 2).get<double>();
  }
  result.right = tokens > 0 && correct == tokens;
  result.log_probability = -loss / std::max(1.0, tokens);
  return result;
}

}  // namespace

ScoreDocument ScoreWith(const Context& ctx, Arena& arena, const model::Model& model,
                        const model::RunOptions& options) {
  return [&ctx, &arena, &model, options](const model::Batch& batch,
                                         std::span<const std::vector<int32_t>> labels) {
    const ArenaScope scope(arena);
    const Tensor hidden = model.ForwardOnly(ctx, arena, batch, options);
    std::vector<kernels::CrossEntropyResult> results;
    model::Batch labelled = batch;
    for (const std::vector<int32_t>& set : labels) {
      labelled.labels = set;
      results.push_back(model::HeadCrossEntropy(ctx, arena, model, labelled, hidden));
    }
    return results;
  };
}

int64_t TaskResult::right() const {
  return std::count_if(samples.begin(), samples.end(),
                       [](const SampleResult& sample) { return sample.right; });
}

double TaskResult::share() const {
  return static_cast<double>(right()) / static_cast<double>(std::max<size_t>(1, samples.size()));
}

double TaskResult::mean_log_probability() const {
  double sum = 0;
  for (const SampleResult& sample : samples) sum += sample.log_probability;
  return sum / static_cast<double>(std::max<size_t>(1, samples.size()));
}

StatusOr<TaskResult> MeasureSource(const parallel::Mesh& mesh, const EvalSource& source,
                                   const ScoreDocument& score) {
  std::vector<EvalSample> mine;
  Status made = OkStatus();
  for (int64_t i = mesh.dp_rank(); made.ok() && i < source.size(); i += mesh.dp_size()) {
    auto sample = source.Make(i);
    made = sample.status();
    if (made.ok()) mine.push_back(std::move(sample).value());
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(mesh.world(), made));
  const bool speaks = mesh.cp_rank() == 0 && mesh.tp_rank() == 0;
  json rows = json::array();
  Status finite = OkStatus();
  const int64_t rounds = (source.size() + mesh.dp_size() - 1) / mesh.dp_size();
  for (int64_t round = 0; round < rounds; ++round) {
    const bool has = round < static_cast<int64_t>(mine.size());
    const EvalSample sample = has ? std::move(mine[static_cast<size_t>(round)]) : NoSample(source);
    SALA_ASSIGN_OR_RETURN(const std::vector<double> numbers, Measure(mesh, score, sample));
    if (!has || !speaks) continue;
    if (!std::all_of(numbers.begin(), numbers.end(), [](double x) { return std::isfinite(x); }) &&
        finite.ok()) {
      finite = MakeError(ExitCode::kNumbers, "NUM-NONFINITE",
                         "evaluation: task " + source.task() + " at length " +
                             std::to_string(source.length()) +
                             ": the model's losses are not finite; it has diverged, or long "
                             "documents overflow");
    }
    rows.push_back(
        {mesh.dp_rank() + round * mesh.dp_size(), sample.depth, sample.hash, sample.id, numbers});
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(mesh.world(), finite));
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                        mesh.world().AllGatherText(rows.dump()));
  std::vector<json> all(static_cast<size_t>(source.size()));
  for (const std::string& text : texts) {
    for (const json& row : ParseJson(text)) all[row.at(0).get<size_t>()] = row;
  }
  TaskResult result;
  result.task = source.task();
  result.length = source.length();
  size_t sets = 0;
  for (const size_t n : source.sets()) sets += n;
  for (const EvalSource::Range& range : source.ranges())
    result.buckets.push_back({.from = range.from, .to = range.to});
  for (const json& row : all) {
    result.samples.push_back(ResultOf(row, sets));
    if (result.of_losses()) result.samples.back().right = false;
    for (size_t s = 0; s < result.buckets.size(); ++s) {
      const json& numbers = row.at(4);
      result.buckets[s].loss += numbers.at(3 * s).get<double>();
      result.buckets[s].count += static_cast<int64_t>(numbers.at(3 * s + 2).get<double>());
    }
  }
  for (LossBucket& bucket : result.buckets)
    bucket.loss /= static_cast<double>(std::max<int64_t>(1, bucket.count));
  return result;
}

StatusOr<Evaluation> Evaluation::Open(const EvalRequest& request,
                                      const data::Tokenizer& tokenizer) {
  Evaluation evaluation;
  const EvalConfig& config = request.config;
  const data::Haystack::Part* part = request.part ? &*request.part : nullptr;
  evaluation.filler_ = std::make_unique<data::Haystack>(data::Haystack::Filler());
  for (const std::string& task : config.tasks) {
    if (const std::string problem = TaskProblem(task); !problem.empty())
      return MakeError(ExitCode::kConfig, "EVAL-TASK", problem);
    const bool losses = IsLossTask(task);
    data::RecallTask recall = {};
    if (!losses) {
      SALA_ASSIGN_OR_RETURN(recall, data::RecallTaskNamed(task));
    }
    const bool text = !losses && data::WantsRunningText(recall);
    if ((losses || text) && config.haystack.empty()) {
      return MakeError(
          ExitCode::kConfig, "EVAL-HAYSTACK",
          "task " + task + " needs running text; name a text dataset (eval.haystack, --haystack)");
    }
    if (text && evaluation.text_ == nullptr) {
      SALA_ASSIGN_OR_RETURN(
          data::Haystack haystack,
          data::Haystack::FromDataset(config.haystack, tokenizer, data::Haystack::kMaxBytes, part));
      evaluation.text_ = std::make_unique<data::Haystack>(std::move(haystack));
    }
    for (const int64_t length : config.lengths_tokens) {
      if (losses) {
        SALA_ASSIGN_OR_RETURN(auto source, OpenLossSource(task, length, config.samples,
                                                          config.haystack, part, tokenizer));
        evaluation.sources_.push_back(std::move(source));
        continue;
      }
      data::RecallOptions options{
          .task = recall, .seed = config.seed, .length_tokens = length, .chat = config.chat};
      if (recall == data::RecallTask::kTracking) options.keys = 5;
      auto source = MakeRecallSource(options, config.samples,
                                     text ? *evaluation.text_ : *evaluation.filler_, tokenizer);
      SALA_RETURN_IF_ERROR(source->Make(0).status());
      evaluation.sources_.push_back(std::move(source));
    }
  }
  if (!request.prompts.empty()) {
    SALA_ASSIGN_OR_RETURN(auto sources, ReadPromptSources(request.prompts, config.chat, tokenizer));
    for (auto& source : sources) evaluation.sources_.push_back(std::move(source));
  }
  return evaluation;
}

StatusOr<std::vector<TaskResult>> Evaluation::Run(const parallel::Mesh& mesh,
                                                  const ScoreDocument& score,
                                                  const EvalHooks& hooks) const {
  std::vector<TaskResult> results;
  for (const auto& source : sources_) {
    if (hooks.skip && hooks.skip(source->task(), source->length())) continue;
    SALA_ASSIGN_OR_RETURN(TaskResult result, MeasureSource(mesh, *source, score));
    if (hooks.done) SALA_RETURN_IF_ERROR(hooks.done(result));
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace sala::recipes
