#include "recipes/eval_stage.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "core/log.h"
#include "parallel/watchdog.h"
#include "recipes/checkpointing.h"
#include "recipes/eval.h"
#include "recipes/eval_report.h"
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

// Everything that decides the numbers; an evaluation that was made of something else counts as not
// made. Gates do not decide them.
ordered_json SettingsOf(const StageConfig& stage, const std::string& save_id) {
  EvalConfig config = *stage.eval;
  config.when = {};
  config.gate = {};
  return {{"eval", EmitConfig(config)},
          {"held_out_seed", stage.data.seed},
          {"held_out_fraction", stage.data.validation.fraction},
          {"sparse_attention", stage.sparse_attention},
          {"save_id", save_id}};
}

struct Place {
  std::string directory, save_id;
  int64_t step = 0;
};

StatusOr<Place> PlaceOf(Session& session, const StageConfig& stage, EvalMoment moment,
                        const std::string& model_path) {
  Place place;
  if (PathExists(model_path + "/manifest.json")) {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(model_path));
    place.step = checkpoint.info().global_step;
    place.save_id = checkpoint.info().save_id;
  }
  char name[32];
  std::snprintf(name, sizeof(name), "eval/%09lld-", static_cast<long long>(place.step));
  place.directory = session.path(name + std::string(NameOf(moment)) + "-" + stage.name);
  return place;
}

// By rank 0; the others take its word.
StatusOr<bool> IsComplete(Session& session, const Place& place, const ordered_json& settings) {
  int64_t complete = 0;
  if (session.is_root()) {
    const auto made = ReadFile(place.directory + "/settings.json");
    complete = made.ok() && *made == settings.dump(1) + "\n" &&
                       PathExists(place.directory + "/summary.jsonl")
                   ? 1
                   : 0;
  }
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

StatusOr<std::vector<TaskResult>> Measure(Session& session, const StageConfig& stage,
                                          const std::string& model_path) {
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
  return evaluation->Run(session.mesh(),
                         ScoreWith(ctx, arena, model, {.sparse_attention = stage.sparse_attention}),
                         [&](const TaskResult&) { return StopWhenAsked(session, stage); });
}

Status Write(Session& session, const StageConfig& stage, EvalMoment moment, const Place& place,
             const std::string& model_path, const ordered_json& settings,
             const std::vector<TaskResult>& results) {
  if (!session.is_root()) return OkStatus();
  // What an earlier evaluation with other settings left must not be taken for a part of this one.
  SALA_RETURN_IF_ERROR(RemoveTree(place.directory));
  SALA_RETURN_IF_ERROR(MakeDirectories(place.directory));
  SALA_RETURN_IF_ERROR(
      WriteFileAtomically(place.directory + "/settings.json", settings.dump(1) + "\n"));
  const EvalIdentity identity = {
      .stage = stage.name, .when = NameOf(moment), .step = place.step, .checkpoint = model_path};
  SALA_RETURN_IF_ERROR(WriteEvaluation(place.directory, results, stage.eval->depths, identity));
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> summary, ReadSummary(place.directory));
  std::printf("\nevaluation %s stage %s, step %lld (%s)\n%s\n", NameOf(moment), stage.name.c_str(),
              static_cast<long long>(place.step), place.directory.c_str(),
              EvaluationTable(summary).c_str());
  std::fflush(stdout);
  return OkStatus();
}

// The summary of the last evaluation of this stage at this moment, of no later step than `step`:
// the directory may hold later ones, of a run that went another way.
StatusOr<std::vector<ordered_json>> SummaryOfStage(Session& session, const std::string& stage,
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
  return ReadSummary(session.path("eval/" + found));
}

struct Share {
  double value = 0;
  std::string text;  // "0.400 (20 of 50)"
};

StatusOr<Share> ShareOf(Session& session, const std::string& stage, EvalMoment moment,
                        const EvalGate& gate, int64_t step) {
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> summary,
                        SummaryOfStage(session, stage, moment, step));
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
                   "the evaluation of stage " + stage + " has no line of " + gate.task +
                       " at length " + std::to_string(gate.length) + "; evaluate again");
}

// "" when the gate holds, else the figures.
StatusOr<std::string> GateProblem(Session& session, const StageConfig& stage, const EvalGate& gate,
                                  int64_t step) {
  SALA_ASSIGN_OR_RETURN(const Share now,
                        ShareOf(session, stage.name, EvalMoment::kAfter, gate, step));
  const std::string found = gate.task + " at length " + std::to_string(gate.length) + ": found " +
                            now.text + ", expected ";
  char limit[64];
  if (gate.min) {
    std::snprintf(limit, sizeof(limit), "at least %.3f", *gate.min);
    return now.value >= *gate.min ? std::string() : found + limit;
  }
  const bool own = gate.max_drop_from == "before";
  SALA_ASSIGN_OR_RETURN(const Share then,
                        ShareOf(session, own ? stage.name : gate.max_drop_from,
                                own ? EvalMoment::kBefore : EvalMoment::kAfter, gate, step));
  // Shares of counts: a difference that is exactly the limit may be off by a rounding.
  constexpr double kRounding = 1e-12;
  if (then.value - now.value <= gate.max_drop + kRounding) return std::string();
  std::snprintf(limit, sizeof(limit), "at most %.3f below ", gate.max_drop);
  return found + limit + then.text + " of " +
         (own ? "before the stage" : "stage " + gate.max_drop_from);
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
  const ordered_json settings = SettingsOf(stage, place->save_id);
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
  SALA_ASSIGN_OR_RETURN(const std::vector<TaskResult> results, Measure(session, stage, model_path));
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(
      session.world(), Write(session, stage, moment, *place, model_path, settings, results)));
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
