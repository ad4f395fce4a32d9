#include "recipes/halo/score.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

#include "core/elementary.h"
#include "core/hash.h"
#include "core/rng.h"
#include "model/loss.h"
#include "recipes/step_loop.h"

namespace sala::recipes {
namespace {

using model::MixerType;

nlohmann::json ToJson(const ItemValues& values) {
  return {{"loss_sum", values.loss_sum}, {"correct", values.correct}, {"kl_sum", values.kl_sum}};
}

ItemValues ValuesFromJson(const nlohmann::json& json) {
  return {.loss_sum = json.at("loss_sum").get<std::vector<double>>(),
          .correct = json.at("correct").get<std::vector<double>>(),
          .kl_sum = json.at("kl_sum").get<std::vector<double>>()};
}

std::string SetName(const std::vector<int64_t>& layers) {
  std::string name;
  for (int64_t layer : layers) name += (name.empty() ? "" : ",") + std::to_string(layer);
  return name;
}

// Multiplicities of n draws with replacement from n items.
void Resample(PhiloxStream& rng, size_t begin, size_t n, std::vector<double>* weights) {
  for (size_t draw = 0; draw < n; ++draw) ++(*weights)[begin + rng.Bounded(n)];
}

}  // namespace

std::string ScoreItems::Fingerprint() const {
  Sha256 hash;
  const auto add = [&hash](const std::vector<int32_t>& v) {
    const auto n = static_cast<int64_t>(v.size());
    hash.Update(&n, sizeof(n));
    hash.Update(v.data(), v.size() * sizeof(int32_t));
  };
  for (size_t i = 0; i < size(); ++i) {
    add((*this)[i].tokens);
    add((*this)[i].labels);
    add((*this)[i].cu_seqlens);
  }
  return hash.HexDigest();
}

nlohmann::json ScoreTable::ToJson() const {
  nlohmann::json swapped = nlohmann::json::array();
  for (const ItemValues& layer : layers) swapped.push_back(recipes::ToJson(layer));
  return {{"teacher", recipes::ToJson(teacher)}, {"layers", swapped}, {"sets", sets}};
}

ScoreTable ScoreTable::FromJson(const nlohmann::json& json) {
  ScoreTable table;
  table.teacher = ValuesFromJson(json.at("teacher"));
  for (const nlohmann::json& layer : json.at("layers"))
    table.layers.push_back(ValuesFromJson(layer));
  table.sets = json.at("sets").get<std::map<std::string, double>>();
  return table;
}

bool ScoreTable::Fits(size_t items, int64_t teacher_layers) const {
  const auto fits = [items](const ItemValues& values) {
    return values.loss_sum.size() == items && values.correct.size() == items &&
           values.kl_sum.size() == items;
  };
  return fits(teacher) && static_cast<int64_t>(layers.size()) <= teacher_layers &&
         std::all_of(layers.begin(), layers.end(), fits);
}

ModelScore Summarise(const ScoreItems& items, const ItemValues& values,
                     const std::vector<double>& weights) {
  const auto weight = [&weights](size_t i) { return weights.empty() ? 1.0 : weights[i]; };
  double loss = 0;
  double targets = 0;
  double kl = 0;
  double tokens = 0;
  double n = 0;
  double recall = 0;
  double recall_square = 0;
  ModelScore score;
  for (size_t i = 0; i < items.size(); ++i) {
    const double w = weight(i);
    const auto item_targets = static_cast<double>(items[i].targets());
    kl += w * values.kl_sum[i];
    tokens += w * static_cast<double>(items[i].size());
    if (i < items.text.size()) {
      loss += w * values.loss_sum[i];
      targets += w * item_targets;
      continue;
    }
    const double probability = PortableExp(-values.loss_sum[i] / std::max(1.0, item_targets));
    n += w;
    recall += w * probability;
    recall_square += w * probability * probability;
    score.exact += values.correct[i] == item_targets ? w : 0.0;
  }
  score.kl = tokens > 0 ? kl / tokens : 0.0;
  if (n > 0) {
    score.recall = recall / n;
    score.exact /= n;
    score.recall_error = std::sqrt(std::max(0.0, recall_square / n - score.recall * score.recall) /
                                   std::max(1.0, n - 1));
  }
  if (targets > 0) {
    score.text = PortableExp(-loss / targets);
    // The loss is a ratio of sums over items; its error by the usual linearisation, carried to
    // exp(-loss).
    double squares = 0;
    for (size_t i = 0; i < items.text.size(); ++i) {
      const double residual =
          values.loss_sum[i] - loss / targets * static_cast<double>(items[i].targets());
      squares += weight(i) * residual * residual;
    }
    const auto pieces = static_cast<double>(items.text.size());
    score.text_error =
        score.text * std::sqrt(squares * pieces / std::max(1.0, pieces - 1)) / targets;
  }
  return score;
}

LayerScores ScoresOf(const ScoreItems& items, const ScoreTable& table,
                     const std::vector<double>& weights) {
  LayerScores scores;
  scores.teacher_recall = Summarise(items, table.teacher, weights).recall;
  for (const ItemValues& layer : table.layers) {
    const ModelScore score = Summarise(items, layer, weights);
    scores.recall.push_back(score.recall);
    scores.text.push_back(score.text);
    scores.kl.push_back(score.kl);
  }
  return scores;
}

std::vector<double> BootstrapShares(const ScoreItems& items, const ScoreTable& table,
                                    const KeepRule& rule, int64_t resamples, int64_t seed) {
  PhiloxStream rng("v1|" + std::to_string(seed) + "|halo||0|bootstrap|");
  std::vector<double> shares(table.layers.size(), 0.0);
  for (int64_t r = 0; r < resamples; ++r) {
    std::vector<double> weights(items.size(), 0.0);
    Resample(rng, 0, items.text.size(), &weights);
    Resample(rng, items.text.size(), items.recall.size(), &weights);
    const std::vector<double> keep =
        KeepScores(rule.selector, ScoresOf(items, table, weights), rule.options);
    for (int64_t layer : TakeLayers(RankLayers(keep), rule.forced, rule.count))
      ++shares[static_cast<size_t>(layer)];
  }
  for (double& share : shares) share /= static_cast<double>(std::max<int64_t>(1, resamples));
  return shares;
}

Status DivergedMixer(const std::string& layers) {
  return MakeError(ExitCode::kNumbers, "NUM-NONFINITE",
                   "score: the teacher with linear mixers in layers " + layers +
                       " gives numbers that are not finite; a mixer diverged: lower "
                       "halo.align.schedule.peak_lr");
}

Scorer::Scorer(const Context& ctx, Arena& arena, const parallel::Mesh& mesh,
               const model::Model& teacher, model::ParameterStore& mixers, const ScoreItems& items)
    : ctx_(ctx), arena_(arena), mesh_(mesh), teacher_(teacher), mixers_(mixers), items_(items) {
  for (size_t first = 0; first < items.size(); first += static_cast<size_t>(mesh.dp_size())) {
    const size_t i = first + static_cast<size_t>(mesh.dp_rank());
    mine_.push_back({.item = i,
                     .batch = i < items.size() ? items[i] : MakeBatch({}),
                     .stream = {},
                     .teacher_hidden = {}});
  }
}

std::vector<char> Scorer::Keep(const ConstTensor& x) const {
  std::vector<char> kept(static_cast<size_t>(x.numel()) * SizeOf(x.dtype()));
  if (kept.empty()) return kept;
  if (ctx_.cuda()) {
    ctx_.gpu->Download(kept.data(), x.raw(), kept.size());
  } else {
    std::memcpy(kept.data(), x.raw(), kept.size());
  }
  return kept;
}

Tensor Scorer::Take(const std::vector<char>& kept) const {
  const int64_t width = teacher_.config().hidden_size;
  const auto row = static_cast<size_t>(width) * SizeOf(ctx_.activation());
  const Tensor copy =
      arena_.New(ctx_.activation(), {static_cast<int64_t>(kept.size() / row), width});
  if (kept.empty()) return copy;
  if (ctx_.cuda()) {
    ctx_.gpu->Upload(copy.raw(), kept.data(), kept.size());
  } else {
    std::memcpy(copy.raw(), kept.data(), kept.size());
  }
  return copy;
}

ItemValues Scorer::Empty() const {
  const std::vector<double> zeros(items_.size(), 0.0);
  return {.loss_sum = zeros, .correct = zeros, .kl_sum = zeros};
}

Status Scorer::Share(ItemValues* values) const {
  for (std::vector<double>* numbers : {&values->loss_sum, &values->correct, &values->kl_sum}) {
    SALA_RETURN_IF_ERROR(
        mesh_.world().AllReduce(std::span<double>(*numbers), parallel::Reduce::kSum));
  }
  return OkStatus();
}

model::MixerTensors Scorer::Mixer(int64_t layer) const {
  return model::BindMixer(teacher_.config(), layer, MixerType::kLightning, mixers_);
}

void Scorer::Measure(const model::Model& model, const Mine& mine, const Tensor& hidden,
                     ItemValues* values) const {
  const model::Batch& batch = mine.batch;
  const ArenaScope scope(arena_);
  const auto ce = model::HeadCrossEntropy(ctx_, arena_, model, batch, hidden);
  kernels::KlDivergenceResult kl;
  if (&model != &teacher_)
    kl = model::HeadKl(ctx_, arena_, teacher_, Take(mine.teacher_hidden), model, hidden, batch);
  if (mine.item >= items_.size()) return;
  values->loss_sum[mine.item] = ce.loss_sum;
  values->correct[mine.item] = static_cast<double>(ce.correct);
  values->kl_sum[mine.item] = kl.loss_sum;
}

StatusOr<ItemValues> Scorer::RunTeacher() {
  ItemValues values = Empty();
  for (Mine& mine : mine_) {
    const ArenaScope scope(arena_);
    const auto keep_first = [this, &mine](int64_t layer, const ConstTensor& x) {
      if (layer == 0) mine.stream = Keep(x);
    };
    const Tensor hidden =
        teacher_.ForwardOnly(ctx_, arena_, mine.batch, {}, 0, {}, nullptr, keep_first);
    mine.teacher_hidden = Keep(hidden);
    Measure(teacher_, mine, hidden, &values);
  }
  SALA_RETURN_IF_ERROR(Share(&values));
  teacher_done_ = true;
  return values;
}

StatusOr<ItemValues> Scorer::RunSwap(int64_t layer) {
  const model::Model swapped = teacher_.WithMixer(layer, MixerType::kLightning, Mixer(layer));
  ItemValues values = Empty();
  for (const Mine& mine : mine_) {
    const ArenaScope scope(arena_);
    const Tensor x = Take(mine.stream);
    Measure(swapped, mine, swapped.ForwardOnly(ctx_, arena_, mine.batch, {}, layer, x), &values);
  }
  SALA_RETURN_IF_ERROR(Share(&values));
  return values;
}

void Scorer::Advance(int64_t layer) {
  for (Mine& mine : mine_) {
    const ArenaScope scope(arena_);
    const Tensor x = Take(mine.stream);
    teacher_.RunLayers(ctx_, arena_, mine.batch, {}, layer, layer + 1, x);
    mine.stream = Keep(x);
  }
}

Status Scorer::ScoreLayers(ScoreTable* table,
                           const std::function<Status(const ScoreTable&)>& done) {
  SALA_ASSIGN_OR_RETURN(table->teacher, RunTeacher());
  for (int64_t layer = 0; layer < teacher_.config().num_hidden_layers; ++layer) {
    if (layer >= static_cast<int64_t>(table->layers.size())) {
      SALA_ASSIGN_OR_RETURN(ItemValues values, RunSwap(layer));
      table->layers.push_back(std::move(values));
      SALA_RETURN_IF_ERROR(done(*table));
    }
    Advance(layer);
  }
  return OkStatus();
}

StatusOr<double> Scorer::ScoreSet(const std::vector<int64_t>& replaced, ScoreTable* table) {
  const std::string name = SetName(replaced);
  if (const auto it = table->sets.find(name); it != table->sets.end()) return it->second;
  model::Model swapped = teacher_;
  for (int64_t layer : replaced)
    swapped = swapped.WithMixer(layer, MixerType::kLightning, Mixer(layer));
  if (!teacher_done_) {
    SALA_ASSIGN_OR_RETURN(table->teacher, RunTeacher());
  }
  ItemValues values = Empty();
  for (const Mine& mine : mine_) {
    const ArenaScope scope(arena_);
    Measure(swapped, mine, swapped.ForwardOnly(ctx_, arena_, mine.batch, {}), &values);
  }
  SALA_RETURN_IF_ERROR(Share(&values));
  const double kl = Summarise(items_, values).kl;
  if (!std::isfinite(kl)) return DivergedMixer(name);
  table->sets[name] = kl;
  return kl;
}

}  // namespace sala::recipes
