#include "recipes/halo/claim_trial.h"

#include <algorithm>
#include <utility>

#include "core/clock.h"
#include "core/file.h"
#include "model/loss.h"
#include "recipes/halo/align.h"
#include "recipes/halo/assemble.h"
#include "recipes/halo/distil.h"
#include "recipes/halo/files.h"
#include "recipes/halo/items.h"
#include "recipes/halo/logit_scale.h"
#include "recipes/halo/score.h"
#include "recipes/halo/select.h"
#include "recipes/halo/transfer.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

// Share of the labels that the model's arg-max finds.
double Recall(Session& session, const model::Model& model, const std::vector<model::Batch>& batches,
              double logit_scale_base) {
  int64_t right = 0;
  int64_t targets = 0;
  for (const model::Batch& batch : batches) {
    const auto result = model::EvaluateCrossEntropy(session.ctx(), session.arena(), model, batch,
                                                    {.logit_scale_base = logit_scale_base});
    right += result.correct;
    targets += result.targets;
  }
  return static_cast<double>(right) / static_cast<double>(std::max<int64_t>(1, targets));
}

StatusOr<StepLoopSummary> Train(Session& session, const StageConfig& stage,
                                const std::string& phase, const HaloPhaseConfig& config,
                                StepTask& task, const json& parent) {
  SALA_ASSIGN_OR_RETURN(const auto stream,
                        data::SampleStream::Open(stage.data, stage.name + "/" + phase,
                                                 config.batch.seq_len_tokens, session.tokenizer()));
  StepLoopConfig loop;
  loop.position = {.stage = stage.name, .phase = phase};
  loop.label = phase;
  loop.batch = config.batch;
  loop.schedule = config.schedule;
  loop.optimizer = config.optimizer;
  loop.validation = stage.validation;
  loop.checkpoint = stage.checkpoint;
  loop.config_yaml = EmitStage(stage);
  loop.parent = parent;
  loop.final_phase = false;
  return RunStepLoop(session, loop, task, *stream, /*resume=*/nullptr);
}

StatusOr<std::vector<model::Batch>> HeldOut(Session& session, const StageConfig& stage) {
  SALA_ASSIGN_OR_RETURN(
      const auto set, data::ValidationSet::Open(stage.data, stage.halo->distil.batch.seq_len_tokens,
                                                session.tokenizer()));
  return HeldOutBatches(*set, session.mesh());
}

}  // namespace

// The trained teacher and what is made of it before hybrids are assembled.
struct ClaimTrial::Teacher {
  LoadedModel loaded;
  model::ParameterStore transferred, aligned;  // mixers of all layers

  Teacher(LoadedModel from, int64_t seed)
      : loaded(std::move(from)),
        transferred(TransferMixers(loaded.config, loaded.params, {.seed = seed})),
        aligned(TransferMixers(loaded.config, loaded.params, {.seed = seed})) {}

  model::Model Model() { return {loaded.config, loaded.params}; }
};

ClaimTrial::ClaimTrial(const ClaimSettings& settings, int64_t seed, std::string directory,
                       int64_t threads, std::string origin,
                       std::function<void(const std::string&)> say)
    : settings_(settings),
      seed_(seed),
      directory_(std::move(directory)),
      threads_(threads),
      origin_(std::move(origin)),
      say_(std::move(say)),
      world_(parallel::MakeSelfCommunicator()),
      tokenizer_(data::MakeByteTokenizer()) {}

Status ClaimTrial::LoadResults() {
  const std::string file = path("results.json");
  if (!PathExists(file)) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(file));
  try {
    const json saved = json::parse(text);
    if (saved.at("settings") != settings_.ToJson() || saved.at("origin") != origin_) {
      return MakeError(
          ExitCode::kConfig, "BENCH-DIR",
          file + ": holds results of " + saved.at("origin").get<std::string>() +
              (saved.at("settings") != settings_.ToJson() ? " with other settings" : "") +
              ", this is " + origin_ +
              "; results are only taken up by the same program with the same options: "
              "choose another directory with --to");
    }
    numbers_ = ClaimNumbers::FromJson(saved.at("numbers"));
  } catch (const std::exception& error) {
    return MakeError(ExitCode::kData, "BENCH-RESULTS",
                     file + ": cannot be read (" + Printable(error.what()) +
                         "); remove it to measure this seed again");
  }
  return OkStatus();
}

Status ClaimTrial::FinishPiece(const std::string& line) {
  const double now = ClockSeconds();
  numbers_.seconds += now - piece_started_;
  piece_started_ = now;
  const json saved = {{"origin", origin_},
                      {"seed", seed_},
                      {"settings", settings_.ToJson()},
                      {"numbers", numbers_.ToJson()}};
  SALA_RETURN_IF_ERROR(WriteFileAtomically(path("results.json"), saved.dump(1) + "\n"));
  say_(line);
  return OkStatus();
}

StageConfig ClaimTrial::Placed(StageConfig stage) const {
  stage.seed = seed_;
  stage.data.seed = seed_;
  for (data::ViewConfig& view : stage.data.mixture) view.dataset = path("data/" + view.dataset);
  for (std::string& dataset : stage.data.validation.datasets) dataset = path("data/" + dataset);
  return stage;
}

ClaimDataOptions ClaimTrial::Documents(ClaimDataOptions options, const std::string& purpose,
                                       int64_t factor) const {
  options.seed = seed_;
  options.purpose = purpose;
  options.length *= factor;
  return options;
}

// A store that was being written when the program ended has no dataset.json.
Status ClaimTrial::MakeData() {
  for (const auto& [name, store] : settings_.stores) {
    const std::string directory = path("data/" + name);
    if (PathExists(directory + "/dataset.json")) continue;
    SALA_RETURN_IF_ERROR(RemoveTree(directory));
    SALA_RETURN_IF_ERROR(MakeDirectories(path("data")));
    SALA_RETURN_IF_ERROR(WriteClaimStore(Documents(store.data, name, 1), store.documents,
                                         store.recalled_only, directory, *tokenizer_));
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<Session>> ClaimTrial::OpenSession(const std::string& name,
                                                           const std::vector<StageConfig>& stages) {
  PipelineConfig config;
  config.name = name;
  config.run.dir = path(name);
  config.run.threads = threads_;
  config.run.tensorboard = false;
  config.run.prometheus = false;
  config.stages = stages;
  SALA_RETURN_IF_ERROR(MakeDirectories(directory_));
  SALA_ASSIGN_OR_RETURN(std::unique_ptr<Session> session, Session::Open(*world_, config));
  SALA_RETURN_IF_ERROR(session->WriteConfig());
  return session;
}

// The checkpoint of the last lesson.
StatusOr<std::string> ClaimTrial::TrainTeacher() {
  std::vector<StageConfig> lessons;
  for (const StageConfig& lesson : settings_.lessons) lessons.push_back(Placed(lesson));
  if (!numbers_.teacher_stream) SALA_RETURN_IF_ERROR(RemoveTree(path("teacher")));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, OpenSession("teacher", lessons));
  const auto count = static_cast<int64_t>(lessons.size());
  for (int64_t i = 0; i < count && !numbers_.teacher_stream; ++i) {
    StageInput input;
    input.config = &lessons[static_cast<size_t>(i)];
    input.index = i;
    input.stages = count;
    if (i > 0) {
      SALA_ASSIGN_OR_RETURN(input.init_path, StageResult(*session, i - 1));
    }
    SALA_RETURN_IF_ERROR(RunPretrainStage(*session, input).status());
  }
  return StageResult(*session, count - 1);
}

Status ClaimTrial::MeasureTeacher(Session& session, Teacher* teacher) {
  const model::Model model = teacher->Model();
  MeasureRecall(session, model, &numbers_.teacher_stream.emplace(),
                &numbers_.teacher_needle.emplace());
  const int64_t length = settings_.stream.length;
  return FinishPiece("teacher: recall at " + std::to_string(length) + " tokens: stream " +
                     Text("%.3f", numbers_.teacher_stream->at(length)) + ", needle " +
                     Text("%.3f", numbers_.teacher_needle->at(length)));
}

void ClaimTrial::MeasureRecall(Session& session, const model::Model& model, RecallByLength* stream,
                               RecallByLength* needle) const {
  const auto measure = [&](const ClaimDataOptions& task, const std::vector<int64_t>& factors,
                           RecallByLength* recall) {
    for (int64_t factor : factors) {
      const ClaimDataOptions documents = Documents(task, "measured", factor);
      (*recall)[documents.length] =
          Recall(session, model, ClaimBatches(documents, settings_.recall_documents, true), 0);
    }
  };
  measure(settings_.stream, settings_.stream_factors, stream);
  measure(settings_.needle, settings_.needle_factors, needle);
}

// The aligned mixers are those of the last checkpoint of the alignment.
Status ClaimTrial::Align(Teacher* teacher) {
  const StageConfig stage = Placed(settings_.halo);
  if (numbers_.alignment_errors.empty()) SALA_RETURN_IF_ERROR(RemoveTree(path("align")));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, OpenSession("align", {stage}));
  if (!numbers_.alignment_errors.empty()) {
    const std::vector<CheckpointListing> all = ListCheckpoints(session->checkpoint_root());
    if (all.empty()) {
      return MakeError(ExitCode::kData, "CKPT-NONE",
                       session->checkpoint_root() +
                           ": the aligned mixers are missing, but results.json says that they were "
                           "measured; remove " +
                           directory_ + " to measure this seed again");
    }
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(all.back().directory));
    return LoadParameters(checkpoint, teacher->aligned);
  }
  const model::Model model = teacher->Model();
  SALA_ASSIGN_OR_RETURN(const auto held_out, data::ValidationSet::Open(
                                                 stage.data, stage.halo->align.batch.seq_len_tokens,
                                                 session->tokenizer()));
  AlignTask task(session->ctx(), session->mesh(), model, teacher->aligned, stage.halo->align_loss,
                 held_out.get());
  SALA_RETURN_IF_ERROR(
      Train(*session, stage, "align", stage.halo->align, task, teacher->loaded.origin).status());
  numbers_.alignment_errors = task.last_errors();
  std::string errors;
  for (double error : numbers_.alignment_errors) errors += " " + Text("%.3f", error);
  return FinishPiece("alignment: error / variance of the target, per layer:" + errors);
}

// The stage's rule on the stage's text; its recall prompts are English sentences, which this
// teacher has never seen, so the prompts are of the tasks that it was trained for.
Status ClaimTrial::Select(Teacher* teacher) {
  if (!numbers_.selected.empty()) return OkStatus();
  const StageConfig stage = Placed(settings_.halo);
  SALA_RETURN_IF_ERROR(RemoveTree(path("score")));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, OpenSession("score", {stage}));
  SALA_ASSIGN_OR_RETURN(ScoreItems items, MakeScoreItems(stage, session->tokenizer()));
  for (const ClaimDataOptions& task : {settings_.stream, settings_.needle}) {
    const auto prompts =
        ClaimBatches(Documents(task, "scored", 1), settings_.recall_documents, true);
    items.recall.insert(items.recall.end(), prompts.begin(), prompts.end());
  }
  const model::Model model = teacher->Model();
  ScoreTable table;
  Scorer scorer(session->ctx(), session->arena(), session->mesh(), model, teacher->aligned, items);
  SALA_RETURN_IF_ERROR(
      scorer.ScoreLayers(&table, [](const ScoreTable&) -> Status { return OkStatus(); }));
  const LayerScores scores = ScoresOf(items, table);
  const RuleOptions rule = {.eps = stage.halo->score.eps,
                            .lambda = stage.halo->score.difference_lambda};
  for (const Selector selector : kClaimSelectors) {
    const std::vector<double> keep = KeepScores(selector, scores, rule);
    const std::vector<int64_t> layers =
        TakeLayers(RankLayers(keep), /*forced=*/{}, stage.halo->softmax_layers);
    numbers_.choices[NameOf(selector)] = layers;
    if (selector != stage.halo->selector) continue;
    numbers_.keep_scores = keep;
    numbers_.selected = layers;
  }
  return FinishPiece("selection: " + std::string(NameOf(stage.halo->selector)) + " keeps layers " +
                     Text(numbers_.selected));
}

Status ClaimTrial::Convert(Teacher* teacher, const std::string& name,
                           const std::vector<int64_t>& layers, bool aligned, bool rope) {
  if (numbers_.conversions.count(name) > 0) return OkStatus();
  const StageConfig stage = Placed(settings_.halo);
  SALA_RETURN_IF_ERROR(RemoveTree(path(name)));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, OpenSession(name, {stage}));
  Hybrid hybrid =
      EnterHype(AssembleHybrid(teacher->loaded.config, teacher->loaded.params,
                               aligned ? teacher->aligned : teacher->transferred, layers),
                {.remove_rope = !rope,
                 .add_gate = true,
                 .gate_init = stage.halo->softmax_gate_init,
                 .seed = seed_});
  const model::Model model = teacher->Model();
  SALA_ASSIGN_OR_RETURN(const std::vector<model::Batch> held_out, HeldOut(*session, stage));
  DistilTask task(session->ctx(), session->mesh(), model, hybrid,
                  {.trainable = stage.halo->trainable, .recompute = false}, held_out);
  SALA_RETURN_IF_ERROR(
      Train(*session, stage, "distil", stage.halo->distil, task, teacher->loaded.origin).status());

  const model::Model student(hybrid.config, hybrid.params);
  SALA_ASSIGN_OR_RETURN(
      const DistilReport report,
      CompareModels(session->ctx(), session->arena(), model, student, held_out, session->mesh()));
  ConversionNumbers found;
  found.softmax_layers = layers;
  found.kl = report.kl;
  found.student_loss = report.student_loss;
  found.teacher_loss = report.teacher_loss;
  MeasureRecall(*session, student, &found.stream, &found.needle);
  if (name == kSelectedHybrid) SALA_RETURN_IF_ERROR(FitScale(*session, student));
  numbers_.conversions[name] = found;
  const int64_t length = settings_.stream.length;
  return FinishPiece(name + ": softmax layers " + Text(layers) + ": KL " + Text("%.4f", found.kl) +
                     ", recall: stream " + Text("%.3f", found.stream.at(length)) + ", needle " +
                     Text("%.3f", found.needle.at(length)));
}

// On documents that nothing else is measured on.
Status ClaimTrial::FitScale(Session& session, const model::Model& hybrid) {
  std::vector<model::Batch> documents;
  for (int64_t factor : settings_.fit_factors) {
    for (const ClaimDataOptions& task : {settings_.stream, settings_.needle}) {
      const auto more = ClaimBatches(Documents(task, "fitted", factor), settings_.fit_documents,
                                     /*recalled_only=*/false);
      documents.insert(documents.end(), more.begin(), more.end());
    }
  }
  SALA_ASSIGN_OR_RETURN(const LogitScaleFit fit,
                        FitLogitScale(session.ctx(), session.arena(), hybrid, documents,
                                      settings_.halo.halo->logit_scale_grid, session.mesh()));
  ClaimNumbers::Scale scale = {
      .base = fit.base, .candidates = fit.candidates, .losses = fit.losses, .needle = {}};
  for (int64_t factor : settings_.needle_factors) {
    const ClaimDataOptions measured = Documents(settings_.needle, "measured", factor);
    scale.needle[measured.length] =
        Recall(session, hybrid, ClaimBatches(measured, settings_.recall_documents, true), fit.base);
  }
  numbers_.scale = std::move(scale);
  return OkStatus();
}

// Different ones, none of them the selected one: whether that is below the mean of others is the
// same question as whether it is below the mean of all.
std::vector<std::vector<int64_t>> ClaimTrial::RandomSets() const {
  const StageConfig& stage = settings_.halo;
  const int64_t layers = settings_.lessons.front().model->num_hidden_layers;
  std::vector<std::vector<int64_t>> sets;
  for (int64_t draw = 0; static_cast<int64_t>(sets.size()) < settings_.random_sets; ++draw) {
    const std::vector<int64_t> set =
        TakeLayers(RandomOrder(layers, 1000 * seed_ + draw), {}, stage.halo->softmax_layers);
    if (set != numbers_.selected && std::find(sets.begin(), sets.end(), set) == sets.end())
      sets.push_back(set);
  }
  return sets;
}

StatusOr<ClaimNumbers> ClaimTrial::Run() {
  SALA_RETURN_IF_ERROR(MakeDirectories(directory_));
  SALA_RETURN_IF_ERROR(LoadResults());
  piece_started_ = ClockSeconds();
  numbers_.length = settings_.stream.length;
  SALA_RETURN_IF_ERROR(MakeData());
  SALA_ASSIGN_OR_RETURN(const std::string teacher_path, TrainTeacher());
  SALA_ASSIGN_OR_RETURN(LoadedModel loaded, LoadModel(teacher_path));
  Teacher teacher(std::move(loaded), seed_);
  if (!numbers_.teacher_stream) {
    SALA_ASSIGN_OR_RETURN(const auto session, OpenSession("measure", {Placed(settings_.halo)}));
    SALA_RETURN_IF_ERROR(MeasureTeacher(*session, &teacher));
  }
  SALA_RETURN_IF_ERROR(Align(&teacher));
  SALA_RETURN_IF_ERROR(Select(&teacher));
  const std::vector<int64_t>& selected = numbers_.selected;
  SALA_RETURN_IF_ERROR(Convert(&teacher, kSelectedHybrid, selected, true, false));
  SALA_RETURN_IF_ERROR(Convert(&teacher, kNotAligned, selected, false, false));
  SALA_RETURN_IF_ERROR(Convert(&teacher, kAllLinear, {}, true, false));
  SALA_RETURN_IF_ERROR(Convert(&teacher, kRopeEverywhere, selected, true, true));
  const std::vector<std::vector<int64_t>> sets = RandomSets();
  for (size_t i = 0; i < sets.size(); ++i)
    SALA_RETURN_IF_ERROR(
        Convert(&teacher, kRandomSet + std::to_string(i + 1), sets[i], true, false));
  return numbers_;
}

}  // namespace sala::recipes
