#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <optional>

#include "core/elementary.h"
#include "core/file.h"
#include "core/log.h"
#include "kernels/common/instruction_set.h"
#include "recipes/eval_stage.h"
#include "recipes/source_record.h"
#include "recipes/stage.h"
#include "recipes/starting_model.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

// Where to go on: the stage to run, and the checkpoint inside it when it was interrupted.
struct Continuation {
  int64_t stage = 0;
  std::string resume;                    // checkpoint of that stage; "" to start it
  std::optional<StageSummary> finished;  // the stage whose result is resumed from
};

// Going back to a named checkpoint while the run holds newer ones would leave two histories under
// one numbering, of which the next start would take the wrong one.
Status RefuseNewer(Session& session, const Checkpoint& named) {
  const std::vector<CheckpointListing> all = ListCheckpoints(session.checkpoint_root());
  if (all.empty() || all.back().global_step <= named.info().global_step) return OkStatus();
  return MakeError(
      ExitCode::kConfig, "CFG-RESUME",
      named.directory() + ": the run already holds the newer " + all.back().directory +
          "; to go on from there set run.resume to auto, to go back move the newer ones away");
}

// Chosen by rank 0, which reads every byte of the checkpoint once; the others get its directory.
StatusOr<std::string> FindResume(Session& session) {
  const RunConfig& run = session.config().run;
  std::string chosen;
  Status status = OkStatus();
  if (session.is_root() && run.resume == "auto") {
    if (run.resume_strict) {
      const std::vector<CheckpointListing> all = ListCheckpoints(session.checkpoint_root());
      if (!all.empty()) {
        auto newest = Checkpoint::Open(all.back().directory);
        status = newest.ok() ? newest->Verify(VerifyLevel::kFull) : newest.status();
        chosen = all.back().directory;
      }
    } else {
      auto newest = NewestValidCheckpoint(session.checkpoint_root(), VerifyLevel::kFull);
      status = newest.status();
      if (newest.ok() && newest->has_value()) chosen = (*newest)->directory();
    }
  } else if (session.is_root() && run.resume != "never") {
    auto named = Checkpoint::Open(run.resume);
    status = named.ok() ? named->Verify(VerifyLevel::kFull) : named.status();
    if (status.ok()) status = RefuseNewer(session, *named);
    chosen = run.resume;
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), status));
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, session.world().AllGatherText(chosen));
  return all[0];
}

// A run killed between a stage's last save and its row in the table gets the row from the
// checkpoint.
std::optional<StageSummary> FinishedStage(const Checkpoint& checkpoint) {
  if (!checkpoint.info().trainer.contains("progress")) return std::nullopt;
  return SummaryRow(PositionOf(checkpoint).stage, SummaryOf(checkpoint));
}

StatusOr<Continuation> Continue(Session& session) {
  SALA_ASSIGN_OR_RETURN(const std::string directory, FindResume(session));
  Continuation next;
  if (directory.empty()) return next;
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  const StagePosition position = PositionOf(checkpoint);
  const std::vector<StageConfig>& stages = session.config().stages;
  if (position.stage_index < 0 || position.stage_index >= static_cast<int64_t>(stages.size()) ||
      stages[static_cast<size_t>(position.stage_index)].name != position.stage) {
    return MakeError(ExitCode::kData, "CKPT-LINEAGE",
                     directory + ": is of stage " + std::to_string(position.stage_index) + " '" +
                         position.stage +
                         "', which this configuration does not have at that place; use the run's "
                         "own configuration, or a new "
                         "run directory with init_from");
  }
  const StageConfig& stage = stages[static_cast<size_t>(position.stage_index)];
  SALA_ASSIGN_OR_RETURN(const std::string saved_yaml, checkpoint.ReadConfig());
  SALA_RETURN_IF_ERROR(CheckResumable(stage, saved_yaml, directory));
  session.global_step = checkpoint.info().global_step;
  next.stage = position.stage_index;
  if (position.stage_final) {
    ++next.stage;
    next.finished = FinishedStage(checkpoint);
  } else {
    next.resume = directory;
  }
  return next;
}

// The rows so far, kept in summary.json so that a resumed run shows all stages.
class Summaries {
 public:
  explicit Summaries(Session& session) : session_(session) {
    const auto text = ReadFile(session.path("summary.json"));
    if (!text.ok()) return;  // a new run
    const auto json = nlohmann::ordered_json::parse(*text, nullptr, false);
    if (!json.is_array()) return;
    for (const auto& row : json) {
      const auto number = [&row](const char* key) {
        return row.contains(key) && row[key].is_number() ? row[key].get<double>() : std::nan("");
      };
      rows_.push_back({.stage = row.value("stage", ""),
                       .tokens = row.value("tokens", int64_t{0}),
                       .seconds = number("seconds"),
                       .loss_before = number("loss_before"),
                       .loss_after = number("loss_after"),
                       .note = row.value("note", "")});
    }
  }

  void Add(const StageSummary& row) {
    std::erase_if(rows_, [&row](const StageSummary& old) { return old.stage == row.stage; });
    rows_.push_back(row);
    auto json = nlohmann::ordered_json::array();
    for (const StageSummary& r : rows_) {
      json.push_back({{"stage", r.stage},
                      {"tokens", r.tokens},
                      {"seconds", r.seconds},
                      {"loss_before", r.loss_before},
                      {"loss_after", r.loss_after},
                      {"note", r.note}});
    }
    session_.WriteSummary(json);
  }

  const std::vector<StageSummary>& rows() const { return rows_; }
  const StageSummary* Find(const std::string& stage) const {
    const auto it = std::find_if(rows_.begin(), rows_.end(),
                                 [&](const StageSummary& r) { return r.stage == stage; });
    return it == rows_.end() ? nullptr : &*it;
  }

 private:
  Session& session_;
  std::vector<StageSummary> rows_;
};

void PrintTable(const std::vector<StageSummary>& rows) {
  std::printf("\n%-14s %12s %12s %12s %12s  %s\n", "stage", "loss before", "loss after", "tokens",
              "tokens/s", "");
  for (const StageSummary& row : rows) {
    std::printf("%-14s %12.4f %12.4f %12lld %12.0f  %s\n", row.stage.c_str(), row.loss_before,
                row.loss_after, static_cast<long long>(row.tokens),
                static_cast<double>(row.tokens) / std::max(1e-9, row.seconds), row.note.c_str());
  }
  std::fflush(stdout);
}

// The conversion's promise: after the first stage behind HALO the hybrid is as good on held-out
// text as the teacher was. Said only where both numbers come from the same held-out data.
void PrintConversionVerdict(const PipelineConfig& config, const Summaries& summaries) {
  for (size_t h = 1; h + 1 < config.stages.size(); ++h) {
    if (config.stages[h].kind != StageKind::kHalo) continue;
    const StageConfig& before = config.stages[h - 1];
    const StageConfig& after = config.stages[h + 1];
    const StageSummary* teacher = summaries.Find(before.name);
    const StageSummary* hybrid = summaries.Find(after.name);
    const bool same_data = EmitConfig(before.data) == EmitConfig(after.data) &&
                           before.batch.seq_len_tokens == after.batch.seq_len_tokens;
    if (teacher == nullptr || hybrid == nullptr || !same_data || !teacher->note.empty() ||
        !hybrid->note.empty())
      continue;
    const double change = PortableExp(hybrid->loss_after - teacher->loss_after) - 1;
    constexpr double kPromise = 0.05;
    std::printf("\nheld-out perplexity: teacher %.3f, hybrid after %s %.3f (%+.1f %%): %s\n",
                PortableExp(teacher->loss_after), after.name.c_str(),
                PortableExp(hybrid->loss_after), 100 * change,
                change <= kPromise ? "within 5 % of the teacher" : "NOT within 5 % of the teacher");
    std::fflush(stdout);
  }
}

// The model that the first stage to run starts from, if it names one: what its shapes do not allow
// is refused before hours of other stages. Stages do not change them.
StatusOr<std::optional<model::ModelConfig>> StartingShapes(Session& session,
                                                           const Continuation& next) {
  if (!next.resume.empty()) return ModelConfigAt(next.resume);
  if (next.stage > 0) {
    SALA_ASSIGN_OR_RETURN(const std::string result, StageResult(session, next.stage - 1));
    return ModelConfigAt(result);
  }
  const StageConfig& stage = session.config().stages[0];
  if (!stage.init_from && !stage.model) return std::nullopt;  // the stage says what is wrong
  return StartingConfig(stage, MissingModel::kRefuse, [&session]() -> StatusOr<int64_t> {
    return session.tokenizer().vocab_size();
  });
}

Status CheckInputs(Session& session, const Continuation& next) {
  SALA_ASSIGN_OR_RETURN(const std::optional<model::ModelConfig> shapes,
                        StartingShapes(session, next));
  for (size_t i = static_cast<size_t>(next.stage); i < session.config().stages.size(); ++i) {
    const StageConfig& stage = session.config().stages[i];
    const Status mesh = parallel::ResolveMesh(session.world().size(), stage.parallel).status();
    if (!mesh.ok()) return Annotate(mesh, "stage " + stage.name);
    if (const std::string problem =
            shapes ? shapes->TensorParallelProblem(stage.parallel.tp) : std::string();
        !problem.empty())
      return MakeError(ExitCode::kConfig, "CFG-MESH", "stage " + stage.name + ": " + problem);
    const Status status = CheckStageInputs(stage, session.tokenizer(), session.config().run.device,
                                           session.world().size());
    if (!status.ok()) return Annotate(status, "stage " + stage.name);
    SALA_RETURN_IF_ERROR(
        Annotate(CheckEvalInputs(stage, session.tokenizer()), "stage " + stage.name));
  }
  return OkStatus();
}

Status EvaluateBefore(Session& session, int64_t index) {
  const StageConfig& stage = session.config().stages[static_cast<size_t>(index)];
  if (!stage.eval || !stage.eval->before()) return OkStatus();
  std::string path = stage.init_from ? stage.init_from->path : "";
  if (index > 0) {
    SALA_ASSIGN_OR_RETURN(path, StageResult(session, index - 1));
  }
  return EvaluateStage(session, stage, EvalMoment::kBefore, path);
}

Status EvaluateAfter(Session& session, int64_t index) {
  const StageConfig& stage = session.config().stages[static_cast<size_t>(index)];
  if (!stage.eval || !stage.eval->after()) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::string path, StageResult(session, index));
  SALA_RETURN_IF_ERROR(EvaluateStage(session, stage, EvalMoment::kAfter, path));
  return CheckStageGates(session, stage, path);
}

// What checkpoints of the stage say about the folder that its weights came from.
Status KeepSourceRecord(Session& session, const StageInput& input) {
  const std::string from = input.resume != nullptr ? input.resume->directory() : input.init_path;
  if (!session.is_root() || from.empty()) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::optional<SourceRecord> record, SourceRecordAt(from));
  session.source_record = record ? record->ToText() : "";
  return OkStatus();
}

StatusOr<StageSummary> RunStage(Session& session, int64_t index,
                                const std::string& resume_directory) {
  const StageConfig& stage = session.config().stages[static_cast<size_t>(index)];
  SALA_RETURN_IF_ERROR(session.UseMesh(stage.parallel));
  StageInput input;
  input.config = &stage;
  input.index = index;
  input.stages = static_cast<int64_t>(session.config().stages.size());
  input.carry_optimizer = stage.carry_optimizer;
  std::optional<Checkpoint> resume;
  if (!resume_directory.empty()) {
    SALA_ASSIGN_OR_RETURN(Checkpoint opened, Checkpoint::Open(resume_directory));
    resume.emplace(std::move(opened));
    input.resume = &*resume;
  }
  // A resumed stage has its model in its own checkpoint; only HALO needs the stage before it again,
  // its teacher.
  const bool needs_start = input.resume == nullptr || stage.kind == StageKind::kHalo;
  if (index > 0 && needs_start) {
    SALA_ASSIGN_OR_RETURN(input.init_path, StageResult(session, index - 1));
  } else if (index == 0 && stage.init_from && needs_start) {
    input.init_path = stage.init_from->path;
    input.carry_optimizer = stage.init_from->carry_optimizer;
    // Numbers go on from the checkpoint a stand-alone stage starts from, so that they never repeat
    // in its lineage.
    if (resume_directory.empty() && PathExists(input.init_path + "/manifest.json")) {
      SALA_ASSIGN_OR_RETURN(const Checkpoint from, Checkpoint::Open(input.init_path));
      session.global_step = from.info().global_step;
    }
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), KeepSourceRecord(session, input)));
  return stage.kind == StageKind::kHalo ? RunHaloStage(session, input)
                                        : RunPretrainStage(session, input);
}

// A stage with its evaluations.
Status RunAndEvaluate(Session& session, int64_t index, const std::string& resume,
                      Summaries* summaries) {
  // A stage that is resumed was evaluated before its first step; what it began from may be gone.
  if (resume.empty()) SALA_RETURN_IF_ERROR(EvaluateBefore(session, index));
  SALA_ASSIGN_OR_RETURN(const StageSummary row, RunStage(session, index, resume));
  summaries->Add(row);
  return EvaluateAfter(session, index);
}

}  // namespace

Status RunPipeline(parallel::Communicator& world, const PipelineConfig& config) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<Session> session, Session::Open(world, config));
  // Around the whole run: it holds wherever no section inside it does.
  const parallel::Section section(session->watchdog(), parallel::Phase::kInit);
  session->WriteStatus("starting", config.stages[0].name, 0);
  auto next = Continue(*session);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, next.status()));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, CheckInputs(*session, *next)));
  Summaries summaries(*session);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, session->WriteConfig()));
  if (next->finished && summaries.Find(next->finished->stage) == nullptr)
    summaries.Add(*next->finished);
  if (session->is_root()) {
    SALA_LOG(Info) << "run " << config.name << " in " << config.run.dir << ": "
                   << config.stages.size() << " stage(s), " << world.size() << " rank(s), "
                   << config.run.threads << " thread(s) each, "
                   << kernels::NameOf(kernels::CurrentInstructionSet());
  }
  const auto note_end = [&](const Status& status, int64_t stage) {
    const bool stopped = ExitCodeOf(status) == ExitCode::kRequeue;
    session->WriteStatus(stopped ? "stopping" : "failed",
                         config.stages[static_cast<size_t>(stage)].name, session->global_step);
    return status;
  };
  // The run may have ended between the last save of a stage and its evaluation, or at a gate.
  if (next->stage > 0 && next->resume.empty()) {
    const Status status = EvaluateAfter(*session, next->stage - 1);
    if (!status.ok()) return note_end(status, next->stage - 1);
  }
  for (int64_t i = next->stage; i < static_cast<int64_t>(config.stages.size()); ++i) {
    const Status status =
        RunAndEvaluate(*session, i, i == next->stage ? next->resume : "", &summaries);
    if (!status.ok()) return note_end(status, i);
    auto request = static_cast<int64_t>(PendingRequest());
    SALA_RETURN_IF_ERROR(world.AllReduce(std::span<int64_t>(&request, 1), parallel::Reduce::kMax));
    if (request == static_cast<int64_t>(Request::kStop) &&
        i + 1 < static_cast<int64_t>(config.stages.size()))
      return Stopped(*session, config.stages[static_cast<size_t>(i)].name);
  }
  if (session->is_root()) {
    PrintTable(summaries.rows());
    PrintConversionVerdict(config, summaries);
  }
  session->WriteStatus("done", config.stages.back().name, session->global_step);
  return OkStatus();
}

}  // namespace sala::recipes
