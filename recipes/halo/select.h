// Which layers keep softmax attention (docs/math/halo.md 4): pure functions of score arrays. Ties
// always go to the lower index.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/status.h"
#include "recipes/config.h"

namespace sala::recipes {

const char* NameOf(Selector selector);

// Whether the selector reads the recall scores, or any scores of layer swaps at all.
bool NeedsRecall(Selector selector);
bool NeedsLayerScores(Selector selector);

// Of M(i), the teacher with only layer i replaced by its aligned linear mixer.
struct LayerScores {
  std::vector<double> recall;  // R in [0, 1]
  std::vector<double> text;    // C in [0, 1]
  std::vector<double> kl;      // KL(teacher to M(i)) per token
  double teacher_recall = 0;
};

struct RuleOptions {
  double eps = 1e-6;
  double lambda = 1.0;
};

// One number per layer, larger = keep softmax there:
//   halo         min(50, (max R - R_i) / (max C - C_i + eps))     arXiv 2601.22156 section 4; the
//   cap is its code's recall_drop  R(teacher) - R_i difference   (max R - R_i) - lambda (max C -
//   C_i) kl_swap      KL_i
std::vector<double> KeepScores(Selector selector, const LayerScores& scores,
                               const RuleOptions& options);

// All layers, largest score first.
std::vector<int64_t> RankLayers(const std::vector<double>& keep_scores);

// Layers 0..layers-1 named from either end: CFG-HALO (78) naming `key` for one out of range or
// named twice. Sorted.
StatusOr<std::vector<int64_t>> ResolveLayers(const std::vector<int64_t>& named, int64_t layers,
                                             const std::string& key);

// The forced layers and the first others of `order`, `count` in all, sorted.
std::vector<int64_t> TakeLayers(const std::vector<int64_t>& order,
                                const std::vector<int64_t>& forced, int64_t count);

// The layers that are not forced, `count` - forced of them at the middles of equal parts, after
// each other the rest: an order for TakeLayers.
std::vector<int64_t> UniformOrder(int64_t layers, const std::vector<int64_t>& forced,
                                  int64_t count);
std::vector<int64_t> RandomOrder(int64_t layers, int64_t seed);

// Replaces one layer at a time, always the one after which `damage` of the replaced set (sorted) is
// least, until `count` softmax layers remain (arXiv 2601.11667). Order: what remains, then the
// replaced ones, last replaced first. `damage` gives finite numbers or an error.
using DamageOf = std::function<StatusOr<double>(const std::vector<int64_t>& replaced)>;
StatusOr<std::vector<int64_t>> GreedyOrder(int64_t layers, const std::vector<int64_t>& forced,
                                           int64_t count, const DamageOf& damage);

}  // namespace sala::recipes
