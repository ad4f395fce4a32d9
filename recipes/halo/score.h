// Scores of layer swaps for the selection (docs/math/halo.md 3): M(i) is the teacher with only
// layer i replaced by its aligned linear mixer.
//
// All models are scored on the same items, so differences are paired. An item is one batch: a piece
// of held-out text, or one recall prompt whose labels are -1 everywhere but at the answer tokens
// (teacher forcing: no generation). Layers below i are the teacher's, so the teacher's residual
// stream at the input of layer i is kept per item and only layers i .. L-1 run.
//
// Items are dealt to the ranks in turn and their values are summed over the ranks item by item,
// each with one term that is not zero: every rank has the same bits whatever the number of ranks.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/context.h"
#include "model/model.h"
#include "nlohmann/json.hpp"
#include "parallel/mesh.h"
#include "recipes/halo/select.h"

namespace sala::recipes {

struct ScoreItems {
  std::vector<model::Batch> text;
  std::vector<model::Batch> recall;

  size_t size() const { return text.size() + recall.size(); }
  const model::Batch& operator[](size_t i) const {
    return i < text.size() ? text[i] : recall[i - text.size()];
  }
  std::string Fingerprint() const;  // SHA-256 of all tokens and labels
};

// Of one model, per item: text first, then recall.
struct ItemValues {
  std::vector<double> loss_sum;  // nats over the item's targets
  std::vector<double> correct;   // targets whose arg-max is right
  std::vector<double>
      kl_sum;  // KL(teacher to model) over the item's tokens; zero for the teacher itself
};

struct ScoreTable {
  ItemValues teacher;
  std::vector<ItemValues> layers;  // of M(0), M(1), ...; shorter while scoring is under way
  std::map<std::string, double>
      sets;  // KL per token of models with several layers replaced: "0,3,4"

  nlohmann::json ToJson() const;
  static ScoreTable FromJson(const nlohmann::json& json);  // throws on another layout
  // Whether the table can be of this many items and of a teacher with this many layers.
  bool Fits(size_t items, int64_t teacher_layers) const;
};

// What the rule and the report see.
struct ModelScore {
  double recall = 0;  // R: mean over items of the geometric mean probability of the answer's tokens
  double recall_error = 0;  // standard errors
  double exact = 0;         // share of items with every answer token right
  double text = 0;          // C: exp(-loss per target)
  double text_error = 0;
  double kl = 0;  // per token, over all items
};
// `weights` (per item) are the multiplicities of a bootstrap resample; empty: once each.
ModelScore Summarise(const ScoreItems& items, const ItemValues& values,
                     const std::vector<double>& weights = {});
LayerScores ScoresOf(const ScoreItems& items, const ScoreTable& table,
                     const std::vector<double>& weights = {});

// Share of `resamples` resamples of the items (text and recall separately, the same for all layers)
// in which each layer is kept.
struct KeepRule {
  Selector selector = Selector::kHalo;
  RuleOptions options;
  std::vector<int64_t> forced;
  int64_t count = 0;
};
std::vector<double> BootstrapShares(const ScoreItems& items, const ScoreTable& table,
                                    const KeepRule& rule, int64_t resamples, int64_t seed);

// NUM-NONFINITE (76): scores of the teacher with these layers ("0,3") replaced are not finite.
Status DivergedMixer(const std::string& layers);

class Scorer {
 public:
  // Everything must outlive the scorer. `mixers` is laid out by AllMixerSpecs and lies where the
  // context computes.
  Scorer(const Context& ctx, Arena& arena, const parallel::Mesh& mesh, const model::Model& teacher,
         model::ParameterStore& mixers, const ScoreItems& items);

  // Fills table.teacher and the layers that it does not have yet; `done` is called after each
  // layer.
  Status ScoreLayers(ScoreTable* table, const std::function<Status(const ScoreTable&)>& done);

  // KL per token of the teacher with these layers replaced, looked up in or added to table.sets;
  // DivergedMixer when it is not finite.
  StatusOr<double> ScoreSet(const std::vector<int64_t>& replaced, ScoreTable* table);

 private:
  // One of this rank's items. All ranks have equally many: the last one may have no number and an
  // empty batch.
  struct Mine {
    size_t item;
    model::Batch batch;
    // Kept in host memory, in the context's activation type: [T, H] each.
    std::vector<char> stream;  // teacher's residual stream at the input of the current layer
    std::vector<char> teacher_hidden;  // after the final norm
  };
  std::vector<char> Keep(const ConstTensor& x) const;
  // A kept tensor, for the computation, in the arena.
  Tensor Take(const std::vector<char>& kept) const;
  // Of one item, into `values` at its place.
  void Measure(const model::Model& model, const Mine& mine, const Tensor& hidden,
               ItemValues* values) const;
  StatusOr<ItemValues> RunTeacher();
  StatusOr<ItemValues> RunSwap(int64_t layer);
  void Advance(int64_t layer);  // streams from the input of `layer` to that of layer + 1
  ItemValues Empty() const;
  Status Share(ItemValues* values) const;
  model::MixerTensors Mixer(int64_t layer) const;

  const Context& ctx_;
  Arena& arena_;
  const parallel::Mesh& mesh_;
  const model::Model& teacher_;
  model::ParameterStore& mixers_;
  const ScoreItems& items_;
  std::vector<Mine> mine_;
  bool teacher_done_ = false;
};

}  // namespace sala::recipes
