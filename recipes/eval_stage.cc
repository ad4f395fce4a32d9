#include "recipes/eval_stage.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "core/file.h"
#include "core/log.h"
#include "parallel/watchdog.h"
#include "recipes/checkpointing.h"
#include "recipes/eval.h"
#include "recipes/eval_compare.h"
#include "recipes/eval_files.h"
#include "recipes/stage.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

using nlohmann::ordered_json;

const char* NameOf(EvalMoment moment) { return moment == EvalMoment::kBefore ? "before" : "after"; }

EvalRequest RequestOf(const StageConfig& stage) {
  EvalRequest request;
  request.config = *stage.eval;
  if (stage.data.validation.fraction > 0)
    request.part = {data::Split::kHeldOut, stage.data.seed, stage.data.validation.fraction};
  return request;
}

StatusOr<ordered_json> SettingsOf(Session& session, const StageConfig& stage,
                                  const std::string& model_path) {
  return EvalSettings(
      RequestOf(stage), session.tokenizer(),
      {.model_path = model_path,
       .sparse_attention = stage.sparse_attention,
       .cp = stage.parallel.cp,
       .tp = stage.parallel.tp,
       .device = session.config().run.device == DeviceKind::kCuda ? "cuda" : "cpu"});
}

struct Place {
  std::string directory;
  int64_t step = 0;
};

StatusOr<Place> PlaceOf(Session& session, const StageConfig& stage, EvalMoment moment,
                        const std::string& model_path) {
  Place place;
  if (PathExists(model_path + "/manifest.json")) {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(model_path));
    place.step = checkpoint.info().global_step;
  }
  char name[32];
  std::snprintf(name, sizeof(name), "eval/%09lld-", static_cast<long long>(place.step));
  place.directory = session.path(name + std::string(NameOf(moment)) + "-" + stage.name);
  return place;
}

// What rank 0 finds; the others take its word. An evaluation that was cut off with these settings
// stays for EvalWriter, any other that is there would be taken for a part of this one.
StatusOr<bool> IsComplete(Session& session, const Place& place,
                          const StatusOr<ordered_json>& settings) {
  int64_t complete = 0;
  Status status = OkStatus();
  if (session.is_root()) {
    status = settings.status();
    if (status.ok()) complete = IsCompleteWith(place.directory, *settings) ? 1 : 0;
    const bool goes_on = status.ok() && StateOf(place.directory) == EvalState::kUnfinished &&
                         SettingsDifference(ReadSettings(place.directory), *settings).empty();
    if (status.ok() && complete == 0 && !goes_on && PathExists(place.directory))
      status = RemoveTree(place.directory);
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), status));
  SALA_RETURN_IF_ERROR(
      session.world().AllReduce(std::span<int64_t>(&complete, 1), parallel::Reduce::kMax));
  return complete == 1;
}

Status StopWhenAsked(Session& session, const StageConfig& stage) {
  auto request = static_cast<int64_t>(PendingRequest());
  SALA_RETURN_IF_ERROR(
      session.world().AllReduce(std::span<int64_t>(&request, 1), parallel::Reduce::kMax));
  return request == static_cast<int64_t>(Request::kStop) ? Stopped(session, stage.name)
                                                         : OkStatus();
}

Status Measure(Session& session, const StageConfig& stage, const std::string& model_path,
               const EvalTarget& target) {
  auto loaded = LoadModel(model_path, LayoutOn(session.mesh()));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), loaded.status()));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), CheckModel(session, *loaded)));
  auto evaluation = Evaluation::Open(RequestOf(stage), session.tokenizer());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), evaluation.status()));
  // Of a device all memory is needed, and none of it is in use between stages.
  session.ReserveMemory(0, 0);
  constexpr size_t kBlock = size_t{64} << 20;
  Arena arena(kBlock, session.ctx().gpu);
  Arena scratch(kBlock, session.ctx().gpu);
  Context ctx = session.ctx();
  ctx.scratch = &scratch;
  model::ComputeParameters parameters(ctx, loaded->params, &session.mesh());
  const model::Model model(loaded->config, parameters.store(), model::Spread(session.mesh()));
  return MakeEvaluation(session.mesh(), *evaluation,
                        ScoreWith(ctx, arena, model, {.sparse_attention = stage.sparse_attention}),
                        target, [&session, &stage] { return StopWhenAsked(session, stage); });
}

Status Show(Session& session, const StageConfig& stage, EvalMoment moment, const Place& place) {
  if (!session.is_root()) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> summary, ReadSummary(place.directory));
  std::printf("\nevaluation %s stage %s, step %lld (%s)\n%s\n", NameOf(moment), stage.name.c_str(),
              static_cast<long long>(place.step), place.directory.c_str(),
              EvaluationTable(summary).c_str());
  std::fflush(stdout);
  return OkStatus();
}

// The directory of the last evaluation of this stage at this moment, of no later step than `step`:
// the run may hold later ones, of a run that went another way.
StatusOr<std::string> DirectoryOfStage(Session& session, const std::string& stage,
                                       EvalMoment moment, int64_t step) {
  const std::string ending = std::string("-") + NameOf(moment) + "-" + stage;
  std::string found;
  if (const auto names = ListDirectory(session.path("eval")); names.ok()) {
    for (const std::string& name : *names) {  // rising steps
      const bool mine = name.size() > ending.size() &&
                        name.find(ending) == name.size() - ending.size() &&
                        name.find('-') == name.size() - ending.size() &&
                        std::strtoll(name.c_str(), nullptr, 10) <= step;
      if (mine && PathExists(session.path("eval/" + name + "/summary.jsonl"))) found = name;
    }
  }
  if (found.empty()) {
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     session.path("eval") + ": holds no evaluation " + NameOf(moment) + " stage " +
                         stage + " up to step " + std::to_string(step) +
                         ", which a gate compares with; evaluate that stage again");
  }
  return session.path("eval/" + found);
}

struct Share {
  double value = 0;
  std::string text;  // "0.400 (20 of 50)"
};

StatusOr<Share> ShareIn(const std::string& directory, const EvalGate& gate) {
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> summary, ReadSummary(directory));
  for (const ordered_json& line : summary) {
    if (line["task"] != gate.task || line["length"] != gate.length || !line.contains("share"))
      continue;
    Share share;
    share.value = line["share"].get<double>();
    char text[64];
    std::snprintf(text, sizeof(text), "%.3f (%lld of %lld)", share.value,
                  static_cast<long long>(line.value("right", int64_t{0})),
                  static_cast<long long>(line.value("count", int64_t{0})));
    share.text = text;
    return share;
  }
  return MakeError(ExitCode::kData, "EVAL-FORMAT",
                   directory + ": has no line of " + gate.task + " at length " +
                       std::to_string(gate.length) + "; evaluate again");
}

// "" when the gate holds, else the figures.
StatusOr<std::string> GateProblem(Session& session, const StageConfig& stage, const EvalGate& gate,
                                  int64_t step) {
  SALA_ASSIGN_OR_RETURN(const std::string directory,
                        DirectoryOfStage(session, stage.name, EvalMoment::kAfter, step));
  SALA_ASSIGN_OR_RETURN(const Share now, ShareIn(directory, gate));
  const std::string found = gate.task + " at length " + std::to_string(gate.length) + ": found " +
                            now.text + ", expected ";
  char limit[64];
  if (gate.min) {
    std::snprintf(limit, sizeof(limit), "at least %.3f", *gate.min);
    return now.value >= *gate.min ? std::string() : found + limit;
  }
  const bool own = gate.max_drop_from == "before";
  const std::string other_name = own ? "before the stage" : "stage " + gate.max_drop_from;
  SALA_ASSIGN_OR_RETURN(const std::string other,
                        DirectoryOfStage(session, own ? stage.name : gate.max_drop_from,
                                         own ? EvalMoment::kBefore : EvalMoment::kAfter, step));
  SALA_ASSIGN_OR_RETURN(const Share then, ShareIn(other, gate));
  SALA_ASSIGN_OR_RETURN(const std::string difference,
                        SamplesDifference(other, directory, gate.task, gate.length));
  if (!difference.empty()) {
    return gate.task + " at length " + std::to_string(gate.length) + ": found " + now.text +
           ", which cannot be compared with that of " + other_name + ": " + difference;
  }
  // Shares of counts: a difference that is exactly the limit may be off by a rounding.
  constexpr double kRounding = 1e-12;
  if (then.value - now.value <= gate.max_drop + kRounding) return std::string();
  std::snprintf(limit, sizeof(limit), "at most %.3f below ", gate.max_drop);
  return found + limit + then.text + " of " + other_name;
}

Status GateStatus(Session& session, const StageConfig& stage, const std::string& model_path) {
  SALA_ASSIGN_OR_RETURN(const Place place, PlaceOf(session, stage, EvalMoment::kAfter, model_path));
  std::string problems;
  for (const EvalGate& gate : stage.eval->gate) {
    SALA_ASSIGN_OR_RETURN(const std::string problem, GateProblem(session, stage, gate, place.step));
    if (!problem.empty()) problems += (problems.empty() ? "" : "; ") + problem;
  }
  if (problems.empty()) return OkStatus();
  if (session.config().run.ignore_gates) {
    SALA_LOG(Warn) << "stage " << stage.name << ": gate ignored: " << problems;
    return OkStatus();
  }
  return MakeError(ExitCode::kNumbers, "EVAL-GATE",
                   "stage " + stage.name + ": " + problems +
                       "; the stage's checkpoint is complete: look at the evaluation, then change "
                       "the stage, or go on with --ignore-gates");
}

}  // namespace

Status EvaluateStage(Session& session, const StageConfig& stage, EvalMoment moment,
                     const std::string& model_path) {
  const bool wanted =
      stage.eval && (moment == EvalMoment::kBefore ? stage.eval->before() : stage.eval->after());
  if (!wanted) return OkStatus();
  auto place = PlaceOf(session, stage, moment, model_path);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session.world(), place.status()));
  const StatusOr<ordered_json> settings =
      session.is_root() ? SettingsOf(session, stage, model_path) : ordered_json();
  SALA_ASSIGN_OR_RETURN(const bool complete, IsComplete(session, *place, settings));
  if (complete) {
    if (session.is_root()) SALA_LOG(Info) << "evaluation " << place->directory << " is complete";
    return OkStatus();
  }
  const parallel::Section section(session.watchdog(), parallel::Phase::kEvaluation, place->step);
  session.WriteStatus("evaluating", stage.name, place->step);
  SALA_RETURN_IF_ERROR(session.UseMesh(stage.parallel));
  // Asked for in the stage's last step: not after a whole task.
  SALA_RETURN_IF_ERROR(StopWhenAsked(session, stage));
  const EvalTarget target = {.directory = place->directory,
                             .settings = *settings,
                             .depths = stage.eval->depths,
                             .identity = {.stage = stage.name,
                                          .when = NameOf(moment),
                                          .step = place->step,
                                          .checkpoint = model_path}};
  SALA_RETURN_IF_ERROR(Measure(session, stage, model_path, target));
  SALA_RETURN_IF_ERROR(
      parallel::AgreeOnStatus(session.world(), Show(session, stage, moment, *place)));
  session.ShowEvaluations();
  return OkStatus();
}

Status CheckStageGates(Session& session, const StageConfig& stage, const std::string& model_path) {
  if (!stage.eval || stage.eval->gate.empty()) return OkStatus();
  return parallel::AgreeOnStatus(
      session.world(), session.is_root() ? GateStatus(session, stage, model_path) : OkStatus());
}

Status CheckEvalInputs(const StageConfig& stage, const data::Tokenizer& tokenizer) {
  if (!stage.eval) return OkStatus();
  return Annotate(Evaluation::Open(RequestOf(stage), tokenizer).status(), "eval");
}

}  // namespace sala::recipes
