#include "recipes/halo/select.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

#include "nlohmann/json.hpp"

namespace sala::recipes {
namespace {

using ::testing::ElementsAre;

nlohmann::json PublishedScores() {
  std::ifstream file(SALA_TEST_DATA "/halo/halo_layer_scores.json");
  return nlohmann::json::parse(file).at("models");
}

LayerScores ScoresOf(const nlohmann::json& model) {
  LayerScores scores;
  scores.recall = model.at("recall").get<std::vector<double>>();
  scores.text = model.at("csr").get<std::vector<double>>();
  scores.teacher_recall = model.at("teacher_recall").get<double>();
  return scores;
}

std::vector<int64_t> Chosen(Selector selector, const LayerScores& scores,
                            const std::vector<int64_t>& forced, int64_t k,
                            const RuleOptions& options = {}) {
  return TakeLayers(RankLayers(KeepScores(selector, scores, options)), forced, k);
}

TEST(SelectionRule, GivesThePublishedLayers) {
  const nlohmann::json models = PublishedScores();
  ASSERT_EQ(models.size(), 3u);
  for (const auto& [name, model] : models.items()) {
    const auto k = model.at("k").get<int64_t>();
    const LayerScores scores = ScoresOf(model);
    const auto halo = model.at("halo_topk").get<std::vector<int64_t>>();
    EXPECT_EQ(Chosen(Selector::kHalo, scores, {}, k), halo) << name;
    // The paper's eps and its code's give the same layers.
    EXPECT_EQ(Chosen(Selector::kHalo, scores, {}, k, {.eps = 1e-10}), halo) << name;
    EXPECT_EQ(RankLayers(KeepScores(Selector::kHalo, scores, {})),
              model.at("halo_order").get<std::vector<int64_t>>())
        << name;
    EXPECT_EQ(Chosen(Selector::kRecallDrop, scores, {}, k),
              model.at("recall_drop_topk").get<std::vector<int64_t>>())
        << name;
  }
}

TEST(SelectionRule, DifferenceSharesLayersWithTheRatio) {
  // Numbers of common layers as recomputed from the published scores (docs/math/halo.md 4).
  const std::map<std::string, size_t> common = {
      {"Qwen3-1.7B", 5}, {"Qwen3-4B", 9}, {"Qwen3-8B", 5}};
  const nlohmann::json models = PublishedScores();
  for (const auto& [name, model] : models.items()) {
    const auto k = model.at("k").get<int64_t>();
    const std::vector<int64_t> a = Chosen(Selector::kHalo, ScoresOf(model), {}, k);
    const std::vector<int64_t> b = Chosen(Selector::kDifference, ScoresOf(model), {}, k);
    std::vector<int64_t> both;
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    EXPECT_EQ(both.size(), common.at(name)) << name;
  }
}

TEST(SelectionRule, ForcedLayersAreKeptAndCounted) {
  const nlohmann::json models = PublishedScores();
  const nlohmann::json& model = models.at("Qwen3-1.7B");
  // Order by score: 3, 8, 2, 9, 21, 25, 6, ...; two places are taken by decision.
  EXPECT_THAT(Chosen(Selector::kHalo, ScoresOf(model), {0, 27}, 7),
              ElementsAre(0, 2, 3, 8, 9, 21, 27));
  // A forced layer that would be chosen anyway takes its own place.
  EXPECT_THAT(Chosen(Selector::kHalo, ScoresOf(model), {0, 3}, 7),
              ElementsAre(0, 2, 3, 8, 9, 21, 25));
}

TEST(SelectionRule, TiesGoToTheLowerIndex) {
  LayerScores scores;
  scores.recall = {0.5, 0.9, 0.5, 0.5};
  scores.text = {0.3, 0.3, 0.3, 0.3};
  scores.kl = {1, 2, 2, 1};
  scores.teacher_recall = 0.9;
  EXPECT_THAT(RankLayers(KeepScores(Selector::kHalo, scores, {})), ElementsAre(0, 2, 3, 1));
  EXPECT_THAT(RankLayers(KeepScores(Selector::kRecallDrop, scores, {})), ElementsAre(0, 2, 3, 1));
  EXPECT_THAT(RankLayers(KeepScores(Selector::kKlSwap, scores, {})), ElementsAre(1, 2, 0, 3));
}

TEST(SelectionRule, RatioIsCappedAndZeroForTheBestRecall) {
  LayerScores scores;
  scores.recall = {0.5, 0.9, 0.8};
  scores.text = {0.7, 0.7, 0.6};
  const std::vector<double> keep = KeepScores(Selector::kHalo, scores, {.eps = 1e-6});
  EXPECT_EQ(keep[0], 50.0);  // 0.4 / 1e-6
  EXPECT_EQ(keep[1], 0.0);
  EXPECT_NEAR(keep[2], 0.1 / (0.1 + 1e-6), 1e-12);
}

TEST(ResolveLayers, CountsFromTheEndAndRefusesOthers) {
  EXPECT_THAT(*ResolveLayers({-1, 0}, 32, "halo.keep"), ElementsAre(0, 31));
  const auto outside = ResolveLayers({32}, 32, "halo.keep");
  EXPECT_EQ(ErrorCodeOf(outside.status()), "CFG-HALO");
  EXPECT_EQ(ExitCodeOf(outside.status()), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(outside.status()), ::testing::HasSubstr("halo.keep names layer 32"));
  EXPECT_EQ(ErrorCodeOf(ResolveLayers({31, -1}, 32, "halo.keep").status()), "CFG-HALO");
  EXPECT_FALSE(ResolveLayers({-33}, 32, "halo.keep").ok());
}

TEST(UniformOrder, TakesTheMiddlesOfEqualParts) {
  EXPECT_THAT(TakeLayers(UniformOrder(8, {}, 2), {}, 2), ElementsAre(2, 6));
  EXPECT_THAT(TakeLayers(UniformOrder(32, {0, 31}, 8), {0, 31}, 8),
              ElementsAre(0, 3, 8, 13, 18, 23, 28, 31));
  EXPECT_THAT(TakeLayers(UniformOrder(6, {1}, 1), {1}, 1), ElementsAre(1));
}

TEST(RandomOrder, IsAPermutationOfTheSeed) {
  std::vector<int64_t> order = RandomOrder(12, 3);
  EXPECT_EQ(order, RandomOrder(12, 3));
  EXPECT_NE(order, RandomOrder(12, 4));
  EXPECT_EQ(std::set<int64_t>(order.begin(), order.end()).size(), 12u);
}

TEST(GreedyOrder, ReplacesTheLeastHarmfulAndSeesInteractions) {
  // Alone, 1 and 2 are the cheapest; together they are dear, so 3 follows 1.
  int64_t calls = 0;
  const auto damage = [&calls](const std::vector<int64_t>& replaced) -> StatusOr<double> {
    ++calls;
    const double single[] = {9, 1, 2, 3, 8};
    double sum = 0;
    for (int64_t layer : replaced) sum += single[layer];
    const std::set<int64_t> set(replaced.begin(), replaced.end());
    return set.count(1) + set.count(2) == 2 ? sum + 100 : sum;
  };
  const auto order = GreedyOrder(5, {4}, 3, damage);
  ASSERT_TRUE(order.ok());
  EXPECT_THAT(*order, ElementsAre(0, 2, 4, 3, 1));
  EXPECT_THAT(TakeLayers(*order, {4}, 3), ElementsAre(0, 2, 4));
  EXPECT_EQ(calls, 4 + 3);  // the forced layer is never tried
}

TEST(GreedyOrder, StopsAtAnError) {
  const auto failing = [](const std::vector<int64_t>&) -> StatusOr<double> {
    return MakeError(ExitCode::kNumbers, "NUM-NONFINITE", "no number");
  };
  EXPECT_EQ(ErrorCodeOf(GreedyOrder(3, {}, 1, failing).status()), "NUM-NONFINITE");
}

}  // namespace
}  // namespace sala::recipes
