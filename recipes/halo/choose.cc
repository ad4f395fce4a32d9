#include "recipes/halo/choose.h"

#include <cmath>
#include <string>
#include <utility>

#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"
#include "recipes/halo/align.h"
#include "recipes/halo/files.h"
#include "recipes/halo/items.h"
#include "recipes/halo/score.h"
#include "recipes/halo/select.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

bool AllFinite(const ModelScore& score) {
  return std::isfinite(score.recall) && std::isfinite(score.text) && std::isfinite(score.kl);
}

json ToJson(const ModelScore& score) {
  return {{"recall", score.recall}, {"recall_error", score.recall_error}, {"exact", score.exact},
          {"text", score.text},     {"text_error", score.text_error},     {"kl", score.kl}};
}

class Choice {
 public:
  explicit Choice(const ChoiceInput& input)
      : session_(input.session),
        stage_(input.stage),
        halo_(*input.stage.halo),
        plan_(input.plan),
        teacher_(input.teacher),
        teacher_model_(input.teacher_model),
        mixers_(input.mixers) {}

  StatusOr<LayerChoice> Run();

 private:
  StatusOr<std::vector<int64_t>> ScoredOrder();
  StatusOr<json> HashOf(const model::ParameterStore& store);
  Status LoadScores(const std::string& settings, size_t items, ScoreTable* table);
  Status WriteScores(const std::string& settings, const ScoreTable& table);
  StatusOr<json> ReportScores(const ScoreItems& items, const ScoreTable& table);
  bool is_root() const { return session_.is_root(); }

  Session& session_;
  const StageConfig& stage_;
  const HaloConfig& halo_;
  const HaloPlan& plan_;
  const LoadedModel& teacher_;
  const model::Model& teacher_model_;
  model::ParameterStore& mixers_;
  json scores_;
};

// Rank 0 reads; a file of other settings, or a broken one, is no reason to stop: scoring starts
// again.
Status Choice::LoadScores(const std::string& settings, size_t items, ScoreTable* table) {
  std::string text;
  if (is_root() && PathExists(HaloFile(session_, "scores.json")))
    text = ReadFile(HaloFile(session_, "scores.json")).value_or("");
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, session_.world().AllGatherText(text));
  try {
    const json saved = json::parse(all[0]);
    if (saved.at("settings") != settings) return OkStatus();
    ScoreTable found = ScoreTable::FromJson(saved.at("items"));
    if (!found.Fits(items, teacher_.config.num_hidden_layers)) return OkStatus();
    *table = std::move(found);
  } catch (const json::exception&) {
    return OkStatus();
  }
  if (is_root()) {
    SALA_LOG(Info) << "score: " << table->layers.size() << " layers and " << table->sets.size()
                   << " sets taken from " << HaloFile(session_, "scores.json");
  }
  return OkStatus();
}

// Scoring can be stopped behind any result: the next start takes up the checkpoint of the alignment
// and these scores.
Status Choice::WriteScores(const std::string& settings, const ScoreTable& table) {
  SALA_RETURN_IF_ERROR(
      WriteHaloJson(session_, "scores.json", {{"settings", settings}, {"items", table.ToJson()}}));
  auto request = static_cast<int64_t>(PendingRequest());
  SALA_RETURN_IF_ERROR(
      session_.world().AllReduce(std::span<int64_t>(&request, 1), parallel::Reduce::kMax));
  if (static_cast<Request>(request) != Request::kStop) return OkStatus();
  return MakeError(ExitCode::kRequeue, "STOPPED",
                   "stopped on request while scoring layers; what is scored is kept in " +
                       HaloFile(session_, "scores.json") +
                       ", start the same command again to go on");
}

// Of the values on all tensor ranks; of the same model cut otherwise it is another one.
StatusOr<json> Choice::HashOf(const model::ParameterStore& store) {
  const uint64_t mine = Xxh3({reinterpret_cast<const char*>(store.data()),
                              static_cast<size_t>(store.size()) * sizeof(float)});
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                        session_.mesh().tp_group().AllGatherText(std::to_string(mine)));
  return json(all);
}

// The table on the log, and as JSON for selection.json and the checkpoints.
StatusOr<json> Choice::ReportScores(const ScoreItems& items, const ScoreTable& table) {
  const ModelScore teacher = Summarise(items, table.teacher);
  json report = {{"teacher", ToJson(teacher)}, {"layers", json::array()}};
  KeepRule rule;
  rule.selector = halo_.selector;
  rule.options = {.eps = halo_.score.eps, .lambda = halo_.score.difference_lambda};
  rule.forced = plan_.forced;
  rule.count = plan_.softmax_layers;
  std::vector<ModelScore> scores;
  for (size_t layer = 0; layer < table.layers.size(); ++layer) {
    scores.push_back(Summarise(items, table.layers[layer]));
    if (!AllFinite(scores.back())) return DivergedMixer(std::to_string(layer));
  }
  const std::vector<double> keep = KeepScores(rule.selector, ScoresOf(items, table), rule.options);
  const std::vector<double> shares =
      halo_.score.bootstrap > 0
          ? BootstrapShares(items, table, rule, halo_.score.bootstrap, stage_.seed)
          : std::vector<double>();
  if (is_root()) {
    SALA_LOG(Info) << "score: teacher: recall " << Text("%.4f", teacher.recall) << ", exact "
                   << Text("%.3f", teacher.exact) << ", text " << Text("%.4f", teacher.text);
  }
  for (size_t layer = 0; layer < scores.size(); ++layer) {
    const ModelScore& score = scores[layer];
    json row = ToJson(score);
    row["layer"] = layer;
    row["keep_score"] = keep[layer];
    if (!shares.empty()) row["bootstrap_keep_share"] = shares[layer];
    report["layers"].push_back(row);
    if (!is_root()) continue;
    SALA_LOG(Info) << "score: layer " << layer << " linear: recall " << Text("%.4f", score.recall)
                   << " +- " << Text("%.4f", score.recall_error) << ", exact "
                   << Text("%.3f", score.exact) << ", text " << Text("%.4f", score.text) << " +- "
                   << Text("%.4f", score.text_error) << ", KL " << Text("%.4f", score.kl) << ", "
                   << NameOf(rule.selector) << " " << Text("%.4g", keep[layer])
                   << (shares.empty()
                           ? ""
                           : ", kept in " + Text("%.0f", 100 * shares[layer]) + " % of resamples");
  }
  report["order"] = RankLayers(keep);
  return report;
}

StatusOr<std::vector<int64_t>> Choice::ScoredOrder() {
  const parallel::Section section(session_.watchdog(), parallel::Phase::kEvaluation);
  auto made = MakeScoreItems(stage_, session_.tokenizer());
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(session_.world(), made.status()));
  const ScoreItems& items = *made;
  SALA_ASSIGN_OR_RETURN(const json teacher_hash, HashOf(teacher_.params));
  SALA_ASSIGN_OR_RETURN(const json mixers_hash, HashOf(mixers_));
  const std::string settings = Sha256Hex(
      json({{"teacher", teacher_hash}, {"mixers", mixers_hash}, {"items", items.Fingerprint()}})
          .dump());
  ScoreTable table;
  SALA_RETURN_IF_ERROR(LoadScores(settings, items.size(), &table));
  model::ComputeParameters mixers(session_.ctx(), mixers_);
  Scorer scorer(session_.ctx(), session_.arena(), session_.mesh(), teacher_model_, mixers.store(),
                items);
  if (is_root()) {
    SALA_LOG(Info) << "score: " << items.text.size() << " pieces of held-out text and "
                   << items.recall.size() << " recall prompts";
  }
  if (halo_.selector == Selector::kGreedy) {
    return GreedyOrder(teacher_.config.num_hidden_layers, plan_.forced, plan_.softmax_layers,
                       [&](const std::vector<int64_t>& replaced) -> StatusOr<double> {
                         SALA_ASSIGN_OR_RETURN(const double kl, scorer.ScoreSet(replaced, &table));
                         SALA_RETURN_IF_ERROR(WriteScores(settings, table));
                         return kl;
                       });
  }
  SALA_RETURN_IF_ERROR(scorer.ScoreLayers(
      &table, [&](const ScoreTable& scored) { return WriteScores(settings, scored); }));
  SALA_ASSIGN_OR_RETURN(const json report, ReportScores(items, table));
  scores_ = report;
  return report["order"].get<std::vector<int64_t>>();
}

StatusOr<LayerChoice> Choice::Run() {
  const int64_t layers = teacher_.config.num_hidden_layers;
  std::vector<int64_t> order;
  switch (halo_.selector) {
    case Selector::kUniform:
      order = UniformOrder(layers, plan_.forced, plan_.softmax_layers);
      break;
    case Selector::kRandom:
      order = RandomOrder(layers, stage_.seed);
      break;
    case Selector::kExplicit:
      order = plan_.explicit_layers;
      break;
    default: {
      SALA_ASSIGN_OR_RETURN(order, ScoredOrder());
    }
  }
  LayerChoice choice;
  choice.layers = TakeLayers(order, plan_.forced, plan_.softmax_layers);
  json selection = {{"selector", NameOf(halo_.selector)},
                    {"forced", plan_.forced},
                    {"softmax_layers", choice.layers},
                    {"order", order},
                    {"ties", "to the lower index"}};
  if (!scores_.is_null()) selection["scores"] = scores_;
  if (is_root())
    SALA_LOG(Info) << "select: " << NameOf(halo_.selector) << " keeps softmax attention in layers "
                   << Text(choice.layers);
  SALA_RETURN_IF_ERROR(WriteHaloJson(session_, "selection.json", selection));
  choice.scores = std::move(scores_);
  return choice;
}

}  // namespace

StatusOr<LayerChoice> ChooseLayers(const ChoiceInput& input) { return Choice(input).Run(); }

}  // namespace sala::recipes
