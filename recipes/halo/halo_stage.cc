// The HALO stage as a state machine: transfer -> align -> score -> select -> distil [-> finetune]
// -> assemble.
//
// Training phases run in the step loop and are found again by the phase name of the checkpoint.
// Transfer and assembly are pure functions of teacher, mixers and configuration and are simply
// repeated. Scores are written to halo/scores.json after every layer and taken from there when
// teacher, mixers and items are still the same bits; once layers are chosen, every checkpoint
// carries the choice.
#include <cmath>
#include <utility>

#include "core/file.h"
#include "core/log.h"
#include "core/trace.h"
#include "recipes/gates.h"
#include "recipes/halo/align.h"
#include "recipes/halo/assemble.h"
#include "recipes/halo/choose.h"
#include "recipes/halo/distil.h"
#include "recipes/halo/files.h"
#include "recipes/halo/fold_qk_norm.h"
#include "recipes/halo/items.h"
#include "recipes/halo/logit_scale.h"
#include "recipes/halo/settings.h"
#include "recipes/halo/transfer.h"
#include "recipes/stage.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

// NaN where the number is missing, or was not finite when it was saved.
double NumberOf(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : std::nan("");
}

constexpr char kQkScales[] = "qk_norm_scales";  // in trainer.halo

class HaloStage {
 public:
  HaloStage(Session& session, const StageInput& input)
      : session_(session), input_(input), stage_(*input.config), halo_(*input.config->halo) {}

  StatusOr<StageSummary> Run();

 private:
  Status Prepare();
  Status LoadTeacher();
  Status RestoreState();
  Status Align();
  Status Choose();
  // The student gets what it does not have yet of HyPE.
  void Enter(bool remove_rope, bool add_gate);
  Status Assemble();
  // Takes the query/key norm out of the softmax layers, where they have it and shall lose it.
  Status FoldNorms();
  Status MeasureGates();
  StatusOr<DistilReport> Compare();
  Status Distil();
  Status Finetune();
  StatusOr<StageSummary> Finish();
  Status FitScale();

  bool is_root() const { return session_.is_root(); }
  model::Spread spread() const { return model::Spread(session_.mesh()); }
  StatusOr<std::unique_ptr<data::ValidationSet>> HeldOut(int64_t seq_len) const;
  // One training phase: stream, loop, summary kept for the stage's totals.
  StatusOr<StepLoopSummary> RunPhase(const std::string& phase, const HaloPhaseConfig& config,
                                     StepTask& task);
  const Checkpoint* ResumeOf(const std::string& phase) const {
    return phase == resume_phase_ ? input_.resume : nullptr;
  }

  Session& session_;
  const StageInput& input_;
  const StageConfig& stage_;
  const HaloConfig& halo_;

  LoadedModel teacher_;
  std::optional<model::ComputeParameters> teacher_parameters_;
  std::optional<model::Model> teacher_model_;
  HaloPlan plan_;
  model::ParameterStore mixers_;
  std::vector<int64_t> chosen_;  // layers that keep softmax attention
  std::string resume_phase_;     // "" when the stage starts
  json state_ = json::object();  // saved with every checkpoint as trainer.halo
  Hybrid student_;
  std::vector<model::Batch> held_out_;  // this rank's, of the distillation length
};

// All ranks read and compute the same; what only one finds ends all.
Status HaloStage::LoadTeacher() {
  SALA_ASSIGN_OR_RETURN(teacher_,
                        LoadModel(input_.init_path, LayoutOn(session_.mesh(), /*whole=*/true)));
  SALA_RETURN_IF_ERROR(CheckModel(session_, teacher_));
  SALA_ASSIGN_OR_RETURN(plan_, PlanHalo(stage_, teacher_.config));
  return OkStatus();
}

Status HaloStage::Prepare() {
  if (input_.init_path.empty()) {
    return MakeError(
        ExitCode::kConfig, "CFG-HALO",
        "stage " + stage_.name +
            ": HALO converts a teacher; name it in init_from.path, or put a stage before");
  }
  if (stage_.model || input_.carry_optimizer) {
    return MakeError(ExitCode::kConfig, "CFG-HALO",
                     "stage " + stage_.name + ": " + (stage_.model ? "model" : "carry_optimizer") +
                         " does not go with kind: halo, whose model and parameters come from the "
                         "teacher; remove it");
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), LoadTeacher()));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(
      session_.world(), is_root() ? MakeDirectories(session_.path("halo")) : OkStatus()));
  teacher_parameters_.emplace(session_.ctx(), teacher_.params, &session_.mesh());
  teacher_model_.emplace(teacher_.config, teacher_parameters_->store(), spread());
  state_["teacher"] = teacher_.origin;
  state_["selector"] = NameOf(halo_.selector);
  SALA_RETURN_IF_ERROR(RestoreState());
  mixers_ = TransferMixers(teacher_.config, teacher_.params,
                           {.seed = stage_.seed, .from_teacher = halo_.align_from_teacher},
                           spread().shard());
  auto held_out = HeldOut(halo_.distil.batch.seq_len_tokens);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), held_out.status()));
  auto batches = HeldOutBatches(**held_out, session_.mesh());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), batches.status()));
  held_out_ = std::move(batches).value();
  if (is_root()) {
    for (const std::string& warning : HaloWarnings(halo_, plan_, teacher_.config))
      SALA_LOG(Warn) << warning;
    SALA_LOG(Info) << "stage " << stage_.name << ": teacher " << input_.init_path << ", "
                   << teacher_.config.num_hidden_layers << " layers, " << plan_.softmax_layers
                   << " keep softmax attention (by decision: " << Text(plan_.forced)
                   << "); linear mixers add " << mixers_.whole_parameters()
                   << " parameters for all layers";
  }
  return OkStatus();
}

Status HaloStage::RestoreState() {
  if (input_.resume == nullptr) return OkStatus();
  const std::string& directory = input_.resume->directory();
  resume_phase_ = PositionOf(*input_.resume).phase;
  if (resume_phase_ != "align" && resume_phase_ != "distil" && resume_phase_ != "finetune") {
    return MakeError(ExitCode::kData, "CKPT-LINEAGE",
                     directory + ": phase '" + resume_phase_ +
                         "' is not one of a HALO stage (align, distil, finetune)");
  }
  state_ = input_.resume->info().trainer.value("halo", json::object());
  const json saved = state_.value("teacher", json::object());
  if (saved.value("save_id", "") != teacher_.origin.value("save_id", "")) {
    return MakeError(ExitCode::kData, "CKPT-LINEAGE",
                     directory + ": was made from the teacher " + saved.value("path", "?") +
                         " (save " + saved.value("save_id", "?") +
                         "), this run's teacher is save " + teacher_.origin.value("save_id", "?") +
                         "; resume with the same teacher, or in a new run.dir");
  }
  if (resume_phase_ == "align") return OkStatus();
  if (!state_.contains("softmax_layers")) {
    return MakeError(ExitCode::kData, "CKPT-MANIFEST",
                     directory + ": trainer.halo.softmax_layers is missing");
  }
  chosen_ = state_["softmax_layers"].get<std::vector<int64_t>>();
  return OkStatus();
}

StatusOr<std::unique_ptr<data::ValidationSet>> HaloStage::HeldOut(int64_t seq_len) const {
  return data::ValidationSet::Open(stage_.data, seq_len, session_.tokenizer());
}

StatusOr<StepLoopSummary> HaloStage::RunPhase(const std::string& phase,
                                              const HaloPhaseConfig& config, StepTask& task) {
  auto stream = data::SampleStream::Open(stage_.data, stage_.name + "/" + phase,
                                         config.batch.seq_len_tokens, session_.tokenizer());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), stream.status()));
  StepLoopConfig loop;
  loop.position = {.stage = stage_.name, .stage_index = input_.index, .phase = phase};
  loop.label = stage_.name + " " + phase + " " + std::to_string(input_.index + 1) + "/" +
               std::to_string(input_.stages);
  loop.batch = config.batch;
  loop.schedule = config.schedule;
  loop.optimizer = config.optimizer;
  loop.validation = stage_.validation;
  loop.checkpoint = stage_.checkpoint;
  loop.config_yaml = EmitStage(stage_);
  loop.parent = teacher_.origin;
  loop.extra_trainer = {{"halo", state_}};
  loop.final_phase = false;
  session_.ExpectResident(stage_, phase, teacher_.config);
  SALA_ASSIGN_OR_RETURN(const StepLoopSummary summary,
                        RunStepLoop(session_, loop, task, **stream, ResumeOf(phase)));
  state_["phases"][phase] = {{"tokens", summary.tokens}, {"seconds", summary.seconds}};
  return summary;
}

Status HaloStage::Align() {
  auto held_out = HeldOut(halo_.align.batch.seq_len_tokens);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), held_out.status()));
  AlignTask task(session_.ctx(), session_.mesh(), *teacher_model_, mixers_, halo_.align_loss,
                 held_out->get());
  SALA_RETURN_IF_ERROR(RunPhase("align", halo_.align, task).status());
  // A resumed phase has not measured the start.
  const bool both = task.first_errors() != task.last_errors();
  for (size_t layer = 0; is_root() && layer < task.last_errors().size(); ++layer) {
    SALA_LOG(Info) << "align: layer " << layer << ": held-out error / variance of the target "
                   << (both ? Text("%.4f", task.first_errors()[layer]) + " -> " : "")
                   << Text("%.4f", task.last_errors()[layer]);
  }
  return OkStatus();
}

Status HaloStage::Choose() {
  SALA_ASSIGN_OR_RETURN(LayerChoice choice, ChooseLayers({session_, stage_, plan_, teacher_,
                                                          *teacher_model_, mixers_}));
  chosen_ = std::move(choice.layers);
  state_["softmax_layers"] = chosen_;
  if (!choice.scores.is_null()) state_["scores"] = std::move(choice.scores);
  return OkStatus();
}

void HaloStage::Enter(bool remove_rope, bool add_gate) {
  student_ = EnterHype(std::move(student_), {.remove_rope = remove_rope,
                                             .add_gate = add_gate,
                                             .gate_init = halo_.softmax_gate_init,
                                             .seed = stage_.seed,
                                             .shard = spread().shard()});
}

Status HaloStage::Assemble() {
  student_ = AssembleHybrid(teacher_.config, teacher_.params, mixers_, chosen_, spread().shard());
  mixers_ = model::ParameterStore();
  Enter(halo_.nope_at == HaloMoment::kDistil, halo_.softmax_gate_at == HaloMoment::kDistil);
  return halo_.qk_norm_fold_at == HaloMoment::kDistil ? FoldNorms() : OkStatus();
}

// The factors are saved with the stage: on resume, parameters come from the checkpoint and what was
// measured is not measured again.
Status HaloStage::FoldNorms() {
  if (halo_.softmax_qk_norm == QkNormForm::kKeep || !student_.config.attn_qk_norm)
    return OkStatus();
  const bool measured = state_.contains(kQkScales);
  std::vector<QkScales> scales;
  if (measured) {
    SALA_ASSIGN_OR_RETURN(
        scales, QkScalesFromJson(state_[kQkScales], student_.config,
                                 input_.resume->directory() + ": trainer.halo." + kQkScales));
  } else {
    const parallel::Section section(session_.watchdog(), parallel::Phase::kEvaluation);
    auto batches = CalibrationBatches(stage_, session_.tokenizer(), session_.mesh());
    SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), batches.status()));
    model::ComputeParameters parameters(session_.ctx(), student_.params, &session_.mesh());
    const model::Model model(student_.config, parameters.store(), spread());
    SALA_ASSIGN_OR_RETURN(scales, MeasureQkScales(session_.ctx(), session_.arena(), model, *batches,
                                                  session_.mesh()));
    state_[kQkScales] = recipes::ToJson(scales);
  }
  student_ = FoldQkNorm(std::move(student_), scales, spread().shard());
  if (is_root())
    SALA_LOG(Info) << "query/key norm of softmax layers " << Text(chosen_)
                   << " folded into their projections"
                   << (measured ? ", by the factors of the checkpoint" : "");
  return OkStatus();
}

Status HaloStage::MeasureGates() {
  auto held_out = HeldOut(halo_.distil.batch.seq_len_tokens);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), held_out.status()));
  model::ComputeParameters parameters(session_.ctx(), student_.params, &session_.mesh());
  const model::Model model(student_.config, parameters.store(), spread());
  return WriteGates(session_, stage_.name, model, **held_out, {});
}

StatusOr<DistilReport> HaloStage::Compare() {
  const parallel::Section section(session_.watchdog(), parallel::Phase::kEvaluation);
  model::ComputeParameters parameters(session_.ctx(), student_.params, &session_.mesh());
  const model::Model model(student_.config, parameters.store(), spread());
  return CompareModels(session_.ctx(), session_.arena(), *teacher_model_, model, held_out_,
                       session_.mesh());
}

Status HaloStage::Distil() {
  DistilTask task(session_.ctx(), session_.mesh(), *teacher_model_, student_,
                  {.trainable = halo_.trainable,
                   .temperature = halo_.temperature,
                   .ce_weight = halo_.ce_weight,
                   .recompute = stage_.recompute},
                  held_out_);
  SALA_ASSIGN_OR_RETURN(const StepLoopSummary summary, RunPhase("distil", halo_.distil, task));
  const double before =
      std::isfinite(summary.validation_before) ? summary.validation_before : summary.first_loss;
  if (std::isfinite(before)) state_["kl_before"] = before;
  SALA_ASSIGN_OR_RETURN(const DistilReport trained, Compare());
  if (trained.tokens > 0)
    state_["distilled"] = {{"kl", trained.kl}, {"student_loss", trained.student_loss}};
  return OkStatus();
}

Status HaloStage::Finetune() {
  FinetuneTask task(session_.ctx(), session_.mesh(), *teacher_model_, student_, stage_.recompute,
                    held_out_);
  return RunPhase("finetune", *halo_.finetune, task).status();
}

Status HaloStage::FitScale() {
  const parallel::Section section(session_.watchdog(), parallel::Phase::kEvaluation);
  auto set = HeldOut(halo_.logit_scale_length_tokens);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), set.status()));
  auto batches = HeldOutBatches(**set, session_.mesh());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), batches.status()));
  const model::Model model(student_.config, student_.params, spread());
  SALA_ASSIGN_OR_RETURN(const LogitScaleFit fit,
                        FitLogitScale(session_.ctx(), session_.arena(), model,
                                      LongDocuments(*batches, halo_.logit_scale_length_tokens / 2),
                                      halo_.logit_scale_grid, session_.mesh()));
  state_["logit_scale"] = fit.ToJson();
  if (is_root() && fit.targets == 0) {
    SALA_LOG(Warn) << "logit scale: no held-out document has "
                   << halo_.logit_scale_length_tokens / 2 << " tokens or more; no scale is fitted";
  } else if (is_root()) {
    SALA_LOG(Info) << "logit scale: a = " << (fit.base > 0 ? Text("%g", fit.base) : "none")
                   << ", loss " << Text("%.4f", fit.losses[0]) << " without a scale, curve in "
                   << HaloFile(session_, "logit_scale.json");
  }
  return WriteHaloJson(session_, "logit_scale.json", state_["logit_scale"]);
}

StatusOr<StageSummary> HaloStage::Finish() {
  SALA_ASSIGN_OR_RETURN(const DistilReport final, Compare());
  SALA_RETURN_IF_ERROR(MeasureGates());
  if (!halo_.logit_scale_grid.empty()) SALA_RETURN_IF_ERROR(FitScale());

  StageSummary summary;
  summary.stage = stage_.name;
  for (const auto& [phase, numbers] : state_["phases"].items()) {
    summary.tokens += numbers.value("tokens", int64_t{0});
    summary.seconds += numbers.value("seconds", 0.0);
  }
  summary.loss_before = final.tokens > 0 ? final.teacher_loss : std::nan("");
  summary.loss_after = final.tokens > 0 ? final.student_loss : std::nan("");
  summary.note = "softmax layers " + Text(chosen_);
  std::string losses;
  if (final.tokens > 0) {
    const json distilled = state_.value("distilled", json::object());
    const double kl_distilled = NumberOf(distilled, "kl");
    summary.note += "; KL " + Text("%.4f", NumberOf(state_, "kl_before")) + " -> " +
                    Text("%.4f", kl_distilled) + ", handed on with " + Text("%.4f", final.kl);
    losses = "; held-out loss: teacher " + Text("%.4f", final.teacher_loss) + ", hybrid " +
             Text("%.4f", NumberOf(distilled, "student_loss")) + ", handed on " +
             Text("%.4f", final.student_loss);
    state_["result"] = {
        {"kl_trained", kl_distilled},         {"kl_final", final.kl},
        {"teacher_loss", final.teacher_loss}, {"student_loss", final.student_loss},
        {"agreement", final.agreement},       {"teacher_entropy", final.teacher_entropy}};
  } else {
    summary.note += "; KL not measured: no held-out documents (data.validation)";
  }
  if (is_root()) {
    SALA_LOG(Info) << "stage " << stage_.name << ": " << summary.note
                   << " (no rotary embedding, gated softmax layers)" << losses;
  }

  ++session_.global_step;  // the assembled model is not the end of a training step: its checkpoint
                           // gets its own number
  SaveRequest request;
  request.position = {
      .stage = stage_.name, .stage_index = input_.index, .phase = "assemble", .stage_final = true};
  request.model = &student_.config;
  request.params = &student_.params;
  request.trainer = {{"halo", state_}};
  request.config_yaml = EmitStage(stage_);
  request.parent = teacher_.origin;
  request.policy = stage_.checkpoint;
  const PartScope part(StepPart::kSave);
  SALA_RETURN_IF_ERROR(SaveCheckpoint(session_, request, true).status());
  return summary;
}

StatusOr<StageSummary> HaloStage::Run() {
  SALA_RETURN_IF_ERROR(Prepare());
  if (resume_phase_.empty() || resume_phase_ == "align") {
    SALA_RETURN_IF_ERROR(Align());
    SALA_RETURN_IF_ERROR(Choose());
  }
  SALA_RETURN_IF_ERROR(Assemble());
  if (resume_phase_ != "finetune") SALA_RETURN_IF_ERROR(Distil());
  // What is handed on, and what a finetuning phase therefore trains.
  Enter(true, true);
  SALA_RETURN_IF_ERROR(FoldNorms());
  if (halo_.finetune) SALA_RETURN_IF_ERROR(Finetune());
  return Finish();
}

}  // namespace

Status CheckHaloInputs(const StageConfig& stage, const data::Tokenizer& tokenizer,
                       DeviceKind device, int ranks) {
  const bool l2_norm = stage.halo->align_loss == AlignLoss::kL2Norm;
  if (device == DeviceKind::kCuda && (l2_norm || !stage.halo->logit_scale_grid.empty())) {
    return MakeError(ExitCode::kConfig, "CFG-HALO",
                     std::string(l2_norm ? "align_loss: l2_norm" : "logit_scale_grid") +
                         " works on the CPU only; use run.device: cpu for this stage, or " +
                         (l2_norm ? "align_loss: mse" : "leave the grid out"));
  }
  std::vector<std::pair<std::string, const HaloPhaseConfig*>> phases = {
      {"align", &stage.halo->align}, {"distil", &stage.halo->distil}};
  if (stage.halo->finetune) phases.emplace_back("finetune", &*stage.halo->finetune);
  for (const auto& [phase, config] : phases) {
    SALA_ASSIGN_OR_RETURN(const parallel::MeshConfig mesh,
                          parallel::ResolveMesh(ranks, stage.parallel));
    SALA_RETURN_IF_ERROR(CheckShares(config->batch, mesh));
    SALA_ASSIGN_OR_RETURN(const auto stream,
                          data::SampleStream::Open(stage.data, stage.name + "/" + phase,
                                                   config->batch.seq_len_tokens, tokenizer));
    SALA_RETURN_IF_ERROR(
        stream->CheckEpochs(config->batch.steps * config->batch.global_batch_sequences()));
  }
  const Selector selector = stage.halo->selector;
  return NeedsLayerScores(selector) || selector == Selector::kGreedy
             ? MakeScoreItems(stage, tokenizer).status()
             : OkStatus();
}

StatusOr<StageSummary> RunHaloStage(Session& session, const StageInput& input) {
  return HaloStage(session, input).Run();
}

}  // namespace sala::recipes
