#include "recipes/halo/select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "core/rng.h"

namespace sala::recipes {
namespace {

constexpr double kRatioCap = 50.0;

bool Contains(const std::vector<int64_t>& list, int64_t value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

std::vector<int64_t> Without(int64_t layers, const std::vector<int64_t>& removed) {
  std::vector<int64_t> rest;
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (!Contains(removed, layer)) rest.push_back(layer);
  }
  return rest;
}

}  // namespace

const char* NameOf(Selector selector) {
  switch (selector) {
    case Selector::kHalo:
      return "halo";
    case Selector::kRecallDrop:
      return "recall_drop";
    case Selector::kDifference:
      return "difference";
    case Selector::kKlSwap:
      return "kl_swap";
    case Selector::kGreedy:
      return "greedy";
    case Selector::kUniform:
      return "uniform";
    case Selector::kRandom:
      return "random";
    case Selector::kExplicit:
      return "explicit";
  }
  return "";
}

bool NeedsRecall(Selector selector) {
  return selector == Selector::kHalo || selector == Selector::kRecallDrop ||
         selector == Selector::kDifference;
}

bool NeedsLayerScores(Selector selector) {
  return NeedsRecall(selector) || selector == Selector::kKlSwap;
}

std::vector<double> KeepScores(Selector selector, const LayerScores& scores,
                               const RuleOptions& options) {
  SALA_CHECK(NeedsLayerScores(selector)) << NameOf(selector) << " has no score per layer";
  if (selector == Selector::kKlSwap) return scores.kl;
  const double best_recall = *std::max_element(scores.recall.begin(), scores.recall.end());
  const double best_text =
      scores.text.empty() ? 0.0 : *std::max_element(scores.text.begin(), scores.text.end());
  std::vector<double> keep(scores.recall.size());
  for (size_t i = 0; i < keep.size(); ++i) {
    const double recall_loss = best_recall - scores.recall[i];
    switch (selector) {
      case Selector::kRecallDrop:
        keep[i] = scores.teacher_recall - scores.recall[i];
        break;
      case Selector::kDifference:
        keep[i] = recall_loss - options.lambda * (best_text - scores.text[i]);
        break;
      default:
        keep[i] = std::min(kRatioCap, recall_loss / (best_text - scores.text[i] + options.eps));
    }
  }
  return keep;
}

std::vector<int64_t> RankLayers(const std::vector<double>& keep_scores) {
  std::vector<int64_t> order(keep_scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return keep_scores[static_cast<size_t>(a)] > keep_scores[static_cast<size_t>(b)];
  });
  return order;
}

StatusOr<std::vector<int64_t>> ResolveLayers(const std::vector<int64_t>& named, int64_t layers,
                                             const std::string& key) {
  std::vector<int64_t> resolved;
  for (int64_t name : named) {
    const int64_t layer = name < 0 ? layers + name : name;
    if (layer < 0 || layer >= layers) {
      return MakeError(ExitCode::kConfig, "CFG-HALO",
                       key + " names layer " + std::to_string(name) +
                           ", the teacher has layers 0 to " + std::to_string(layers - 1) +
                           " (negative numbers count from the end)");
    }
    if (Contains(resolved, layer)) {
      return MakeError(
          ExitCode::kConfig, "CFG-HALO",
          key + " names layer " + std::to_string(layer) + " twice; name each layer once");
    }
    resolved.push_back(layer);
  }
  std::sort(resolved.begin(), resolved.end());
  return resolved;
}

std::vector<int64_t> TakeLayers(const std::vector<int64_t>& order,
                                const std::vector<int64_t>& forced, int64_t count) {
  std::vector<int64_t> taken = forced;
  for (int64_t layer : order) {
    if (static_cast<int64_t>(taken.size()) >= count) break;
    if (!Contains(taken, layer)) taken.push_back(layer);
  }
  std::sort(taken.begin(), taken.end());
  return taken;
}

std::vector<int64_t> UniformOrder(int64_t layers, const std::vector<int64_t>& forced,
                                  int64_t count) {
  const std::vector<int64_t> candidates = Without(layers, forced);
  const auto n = static_cast<int64_t>(candidates.size());
  const int64_t wanted = count - static_cast<int64_t>(forced.size());
  std::vector<int64_t> order;
  for (int64_t part = 0; part < wanted; ++part) {
    order.push_back(candidates[static_cast<size_t>((2 * part + 1) * n / (2 * wanted))]);
  }
  for (int64_t layer : Without(layers, order)) order.push_back(layer);
  return order;
}

std::vector<int64_t> RandomOrder(int64_t layers, int64_t seed) {
  return PhiloxStream("v1|" + std::to_string(seed) + "|halo||0|select|random").Permutation(layers);
}

StatusOr<std::vector<int64_t>> GreedyOrder(int64_t layers, const std::vector<int64_t>& forced,
                                           int64_t count, const DamageOf& damage) {
  std::vector<int64_t> replaced;  // sorted
  std::vector<int64_t> in_order;  // as they were replaced
  while (layers - static_cast<int64_t>(replaced.size()) > count) {
    double least = std::numeric_limits<double>::infinity();
    int64_t chosen = -1;
    for (int64_t layer = 0; layer < layers; ++layer) {
      if (Contains(replaced, layer) || Contains(forced, layer)) continue;
      std::vector<int64_t> candidate = replaced;
      candidate.insert(std::upper_bound(candidate.begin(), candidate.end(), layer), layer);
      SALA_ASSIGN_OR_RETURN(const double value, damage(candidate));
      SALA_CHECK(std::isfinite(value)) << "damage of a replaced set";
      if (value < least || chosen < 0) {
        least = value;
        chosen = layer;
      }
    }
    SALA_CHECK(chosen >= 0) << "every layer is forced or replaced";
    replaced.insert(std::upper_bound(replaced.begin(), replaced.end(), chosen), chosen);
    in_order.push_back(chosen);
  }
  std::vector<int64_t> order = Without(layers, replaced);
  order.insert(order.end(), in_order.rbegin(), in_order.rend());
  return order;
}

}  // namespace sala::recipes
