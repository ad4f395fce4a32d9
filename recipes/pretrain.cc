// Stages that train on next tokens: base, stable, short decay, long decay, SFT. They differ in
// configuration only; SFT data brings its loss mask with it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/elementary.h"
#include "core/log.h"
#include "model/loss.h"
#include "model/work.h"
#include "parallel/ordered_sum.h"
#include "recipes/chat_check.h"
#include "recipes/gates.h"
#include "recipes/stage.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

class PretrainTask : public StepTask {
 public:
  PretrainTask(const Context& ctx, parallel::Mesh& mesh, LoadedModel loaded,
               const StageConfig& stage, const data::ValidationSet& validation)
      : loaded_(std::move(loaded)),
        parameters_(ctx, loaded_.params, &mesh),
        model_(loaded_.config, parameters_.store(), model::Spread(mesh)),
        options_{.sparse_attention = stage.sparse_attention, .recompute = stage.recompute},
        validation_(validation) {}

  const model::ModelConfig& config() const override { return loaded_.config; }
  model::ComputeParameters& parameters() override { return parameters_; }
  const LoadedModel& loaded() const { return loaded_; }
  double WorkOf(int64_t document_tokens) const override {
    return model::ForwardWorkOf(config(), options_.sparse_attention, document_tokens).step();
  }
  Status WriteGates(Session& session, const std::string& stage) const {
    return recipes::WriteGates(session, stage, model_, validation_, options_);
  }

  Status MicroBatch(const Context& ctx, Arena& arena, const model::Batch& batch,
                    const StepCounts& counts, model::ParameterStore& gradients,
                    std::span<double> sums) override {
    const model::ModelTensors views = model::BindTensors(loaded_.config, gradients);
    const auto grad_scale =
        static_cast<float>(1.0 / static_cast<double>(std::max<int64_t>(1, counts.targets)));
    const auto result =
        model::CrossEntropyStep(ctx, arena, model_, batch, options_, grad_scale, views);
    sums[0] += result.loss_sum;
    sums[1] += static_cast<double>(result.correct);
    return OkStatus();
  }

  std::vector<std::string> SumNames() const override { return {"loss_sum", "correct"}; }

  std::vector<std::pair<std::string, double>> Values(std::span<const double> sums,
                                                     const StepCounts& counts) const override {
    const auto targets = static_cast<double>(std::max<int64_t>(1, counts.targets));
    return {{"loss", sums[0] / targets}, {"accuracy", sums[1] / targets}};
  }

  StatusOr<std::vector<std::pair<std::string, double>>> Validate(Session& session) override {
    std::vector<std::pair<std::string, double>> values;
    if (validation_.size() == 0) return values;
    SALA_ASSIGN_OR_RETURN(const ValidationResult result,
                          EvaluateValidation(session, model_, validation_, options_));
    values.emplace_back("loss", result.loss);
    values.emplace_back("perplexity", PortableExp(result.loss));
    values.emplace_back("accuracy", result.accuracy);
    return values;
  }

 private:
  LoadedModel loaded_;
  model::ComputeParameters parameters_;
  model::Model model_;
  model::RunOptions options_;
  const data::ValidationSet& validation_;
};

StatusOr<LoadedModel> StartingModel(Session& session, const StageInput& input) {
  const StoreLayout layout = LayoutOn(session.mesh());
  if (input.resume != nullptr) {
    SALA_ASSIGN_OR_RETURN(LoadedModel resumed, LoadModel(input.resume->directory(), layout));
    resumed.origin = input.resume->info().parent;
    return resumed;
  }
  if (!input.init_path.empty()) return LoadModel(input.init_path, layout);
  LoadedModel fresh;
  fresh.config = *input.config->model;
  const data::Tokenizer& tokenizer = session.tokenizer();
  if (fresh.config.vocab_size == 0) fresh.config.vocab_size = tokenizer.vocab_size();
  const auto from_tokenizer = [](int64_t* id, int32_t own) {
    if (*id < 0) *id = own;
  };
  from_tokenizer(&fresh.config.bos_token_id, tokenizer.bos_id());
  from_tokenizer(&fresh.config.eos_token_id, tokenizer.eos_id());
  from_tokenizer(&fresh.config.pad_token_id, tokenizer.pad_id());
  SALA_RETURN_IF_ERROR(fresh.config.Resolve());
  SALA_ASSIGN_OR_RETURN(fresh.params, layout(fresh.config));
  model::InitialiseParameters(fresh.config, input.config->seed, fresh.params);
  return fresh;
}

Status RequireChatData(const data::SampleStream& stream) {
  for (const auto& view : stream.views()) {
    if (view->store().info().sft()) continue;
    return MakeError(ExitCode::kConfig, "CFG-DATA",
                     "dataset '" + view->name() +
                         "' has no loss mask but the stage is of kind sft; ingest chat records "
                         "(messages), or use kind: pretrain");
  }
  return OkStatus();
}

// Documents end with the tokenizer's eos, exports stop at the model's.
void WarnOfOtherEos(const Session& session, const model::ModelConfig& model) {
  const int64_t documents = session.tokenizer().eos_id();
  const int64_t exports = model.eos_token_id;
  if (!session.is_root() || documents < 0 || exports < 0 || documents == exports) return;
  SALA_LOG(Warn) << "documents end with the tokenizer's eos, id " << documents
                 << ", but exports will stop at the model's, id " << exports
                 << " (eos_token_id of its config.json); where the model was trained to end with "
                 << exports << ", make that token the eos_token in the tokenizer's "
                 << "tokenizer_config.json and ingest again, else correct config.json and import "
                 << "again";
}

}  // namespace

Status CheckModel(Session& session, const LoadedModel& loaded) {
  const model::TensorShard shard{session.mesh().tp_rank(), session.mesh().tp_size()};
  if (const std::string problem = loaded.config.Local(shard).CudaProblem();
      session.ctx().cuda() && !problem.empty()) {
    return MakeError(ExitCode::kConfig, "CFG-MODEL", problem + "; use run.device: cpu");
  }
  const std::string& expected = loaded.tokenizer_fingerprint;
  if (!expected.empty() && expected != session.tokenizer().fingerprint()) {
    return MakeError(ExitCode::kData, "TOK-MISMATCH",
                     loaded.origin.value("path", "") + ": trained with the tokenizer " +
                         expected.substr(0, 12) + "..., this run's is " +
                         session.tokenizer().fingerprint().substr(0, 12) +
                         "...; use the tokenizer folder of that model");
  }
  WarnOfOtherEos(session, loaded.config);
  return CheckVocabulary(session.tokenizer(), loaded.config);
}

Status CheckVocabulary(const data::Tokenizer& tokenizer, const model::ModelConfig& model) {
  const int64_t tokens = tokenizer.vocab_size();
  if (tokens <= model.vocab_size) return OkStatus();
  return MakeError(ExitCode::kData, "TOK-VOCAB",
                   "tokenizer " + tokenizer.name() + " has " + std::to_string(tokens) +
                       " tokens, the model has " + std::to_string(model.vocab_size) +
                       " (model.vocab_size); use the model's own tokenizer or set vocab_size to "
                       "0 for a new model");
}

StatusOr<ValidationResult> EvaluateValidation(Session& session, const model::Model& model,
                                              const data::ValidationSet& set,
                                              const model::RunOptions& options) {
  auto batches = HeldOutBatches(set, session.mesh());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), batches.status()));
  std::vector<double> mine;  // of each sample: loss, targets, right ones
  for (const model::Batch& batch : *batches) {
    const auto result =
        model::EvaluateCrossEntropy(session.ctx(), session.arena(), model, batch, options);
    mine.insert(mine.end(), {result.loss_sum, static_cast<double>(result.targets),
                             static_cast<double>(result.correct)});
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<double> sums,
                        parallel::SumDealtItems(session.mesh(), mine, 3));
  ValidationResult result;
  result.targets = static_cast<int64_t>(sums[1]);
  result.loss = sums[0] / std::max(1.0, sums[1]);
  result.accuracy = sums[2] / std::max(1.0, sums[1]);
  return result;
}

Status CheckPretrainInputs(const StageConfig& stage, const data::Tokenizer& tokenizer, int ranks) {
  SALA_ASSIGN_OR_RETURN(const parallel::MeshConfig mesh,
                        parallel::ResolveMesh(ranks, stage.parallel));
  SALA_RETURN_IF_ERROR(CheckShares(stage.batch, mesh));
  SALA_ASSIGN_OR_RETURN(
      const auto stream,
      data::SampleStream::Open(stage.data, stage.name, stage.batch.seq_len_tokens, tokenizer));
  SALA_RETURN_IF_ERROR(
      stream->CheckEpochs(stage.batch.steps * stage.batch.global_batch_sequences()));
  if (stage.kind != StageKind::kSft) return OkStatus();
  SALA_RETURN_IF_ERROR(RequireChatData(*stream));
  return CheckLearned(*stream, stage.name, /*warns=*/false);
}

StageSummary SummaryRow(const std::string& stage, const StepLoopSummary& done) {
  StageSummary summary;
  summary.stage = stage;
  summary.tokens = done.tokens;
  summary.seconds = done.seconds;
  const bool measured =
      std::isfinite(done.validation_before) && std::isfinite(done.validation_after);
  summary.loss_before = measured ? done.validation_before : done.first_loss;
  summary.loss_after = measured ? done.validation_after : done.last_loss;
  summary.note = measured ? "" : "training loss";
  return summary;
}

StatusOr<StageSummary> RunPretrainStage(Session& session, const StageInput& input) {
  const StageConfig& stage = *input.config;
  auto loaded = StartingModel(session, input);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), loaded.status()));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), CheckModel(session, *loaded)));

  auto opened = data::SampleStream::Open(stage.data, stage.name, stage.batch.seq_len_tokens,
                                         session.tokenizer());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), opened.status()));
  const std::unique_ptr<data::SampleStream> stream = std::move(opened).value();
  auto held_out =
      data::ValidationSet::Open(stage.data, stage.batch.seq_len_tokens, session.tokenizer());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), held_out.status()));

  StepLoopConfig loop;
  loop.position = {.stage = stage.name, .stage_index = input.index};
  loop.label =
      stage.name + " " + std::to_string(input.index + 1) + "/" + std::to_string(input.stages);
  loop.batch = stage.batch;
  loop.schedule = stage.schedule;
  loop.optimizer = stage.optimizer;
  loop.validation = stage.validation;
  loop.checkpoint = stage.checkpoint;
  loop.config_yaml = EmitStage(stage);
  loop.parent = loaded->origin;
  std::optional<Checkpoint> carry;
  if (input.carry_optimizer && input.resume == nullptr) {
    if (!loaded->checkpoint) {
      return MakeError(ExitCode::kConfig, "CFG-CONFLICT",
                       "stage " + stage.name + ": carry_optimizer is on, but " + input.init_path +
                           " holds no optimizer state; turn it off");
    }
    carry = loaded->checkpoint;
  }
  if (session.is_root()) {
    SALA_LOG(Info) << "stage " << stage.name << ": " << loaded->params.whole_parameters()
                   << " parameters, " << stage.batch.steps << " steps of "
                   << stage.batch.global_batch_sequences() << " x " << stage.batch.seq_len_tokens
                   << " tokens" << (stage.sparse_attention ? ", sparse attention on" : "");
  }
  if (stage.kind == StageKind::kSft) {
    Status chats = CheckLearned(*stream, stage.name, session.is_root());
    if (chats.ok() && session.is_root())
      chats = LogFirstChat(*stream, stage.name, session.tokenizer());
    SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), chats));
  }

  session.ExpectResident(stage, loop.position.phase, loaded->config);
  PretrainTask task(session.ctx(), session.mesh(), std::move(loaded).value(), stage, **held_out);
  SALA_ASSIGN_OR_RETURN(
      const StepLoopSummary done,
      RunStepLoop(session, loop, task, *stream, input.resume, carry ? &*carry : nullptr));
  SALA_RETURN_IF_ERROR(task.WriteGates(session, stage.name));
  return SummaryRow(stage.name, done);
}

}  // namespace sala::recipes
