#include "recipes/halo/score.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "model/loss.h"
#include "recipes/halo/items.h"
#include "recipes/halo/logit_scale.h"
#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using testing::RandomBatch;
using testing::RandomTeacher;
using testing::TeacherConfig;

class ScoreTest : public testing::HaloTest {
 protected:
  ScoreTest()
      : config_(TeacherConfig()),
        teacher_(RandomTeacher(config_)),
        model_(config_, teacher_),
        mixers_(TransferMixers(config_, teacher_, {.seed = 3})) {
    items_.text = {RandomBatch(config_, {20, 11}, "a"), RandomBatch(config_, {25}, "b")};
    items_.recall = {RecallBatch({1, 2, 3, 4, 5}, {6, 7}), RecallBatch({9, 8, 7}, {3}),
                     RecallBatch({4, 4, 4, 2}, {1, 5})};
  }

  ScoreTable Score(ScoreTable table = {}, int64_t* layers_run = nullptr) {
    Scorer scorer(ctx_, arena_, *mesh_, model_, mixers_, items_);
    const Status status = scorer.ScoreLayers(&table, [layers_run](const ScoreTable&) {
      if (layers_run != nullptr) ++*layers_run;
      return OkStatus();
    });
    EXPECT_TRUE(status.ok());
    return table;
  }

  model::ModelConfig config_;
  model::ParameterStore teacher_;
  model::Model model_;
  model::ParameterStore mixers_;
  ScoreItems items_;
};

TEST_F(ScoreTest, RecallItemsHaveLabelsAtTheAnswerOnly) {
  const model::Batch batch = RecallBatch({1, 2, 3}, {8, 9});
  EXPECT_THAT(batch.tokens, ::testing::ElementsAre(1, 2, 3, 8, 9));
  EXPECT_THAT(batch.labels, ::testing::ElementsAre(-1, -1, 8, 9, -1));
}

TEST_F(ScoreTest, CachedStreamsGiveTheBitsOfWholePasses) {
  const ScoreTable table = Score();
  ASSERT_EQ(table.layers.size(), 4u);
  for (int64_t layer = 0; layer < 4; ++layer) {
    const model::Model swapped =
        model_.WithMixer(layer, model::MixerType::kLightning,
                         model::BindMixer(config_, layer, model::MixerType::kLightning, mixers_));
    for (size_t i = 0; i < items_.size(); ++i) {
      const auto expected = model::EvaluateCrossEntropy(ctx_, arena_, swapped, items_[i], {});
      EXPECT_EQ(table.layers[static_cast<size_t>(layer)].loss_sum[i], expected.loss_sum)
          << layer << " " << i;
      EXPECT_EQ(table.layers[static_cast<size_t>(layer)].kl_sum[i],
                model::EvaluateKl(ctx_, arena_, model_, swapped, items_[i], {}).loss_sum);
    }
  }
  EXPECT_THAT(table.teacher.kl_sum, ::testing::Each(0.0));
}

TEST_F(ScoreTest, ResumedScoringHasTheSameBits) {
  const ScoreTable whole = Score();
  ScoreTable part = whole;
  part.layers.resize(2);
  // Through the file format.
  const ScoreTable restored = ScoreTable::FromJson(nlohmann::json::parse(part.ToJson().dump()));
  int64_t run = 0;
  const ScoreTable resumed = Score(restored, &run);
  EXPECT_EQ(run, 2);
  EXPECT_EQ(resumed.ToJson(), whole.ToJson());
}

TEST_F(ScoreTest, SetsOfOneLayerEqualTheSwapAndAreRemembered) {
  ScoreTable table = Score();
  Scorer scorer(ctx_, arena_, *mesh_, model_, mixers_, items_);
  const auto single = scorer.ScoreSet({2}, &table);
  ASSERT_TRUE(single.ok());
  EXPECT_EQ(*single, Summarise(items_, table.layers[2]).kl);
  ASSERT_TRUE(scorer.ScoreSet({0, 2}, &table).ok());
  EXPECT_EQ(table.sets.size(), 2u);
  table.sets["0,2"] = 7;
  EXPECT_EQ(*scorer.ScoreSet({0, 2}, &table), 7);
}

TEST_F(ScoreTest, ADivergedMixerIsAnErrorAndNotRemembered) {
  mixers_.data()[mixers_.Spec("model.layers.2.self_attn.q_proj.weight").offset] =
      std::numeric_limits<float>::quiet_NaN();
  Scorer scorer(ctx_, arena_, *mesh_, model_, mixers_, items_);
  ScoreTable table;
  const auto damage = [&](const std::vector<int64_t>& replaced) {
    return scorer.ScoreSet(replaced, &table);
  };
  const auto order = GreedyOrder(4, {0}, 1, damage);
  EXPECT_EQ(ErrorCodeOf(order.status()), "NUM-NONFINITE");
  EXPECT_EQ(ExitCodeOf(order.status()), ExitCode::kNumbers);
  EXPECT_THAT(MessageOf(order.status()), ::testing::HasSubstr("in layers 2 gives"));
  EXPECT_EQ(table.sets.size(), 1u);  // of layer 1 alone
}

TEST_F(ScoreTest, TablesOfOtherSizesDoNotFit) {
  const ScoreTable table = Score();
  EXPECT_TRUE(table.Fits(items_.size(), 4));
  EXPECT_FALSE(table.Fits(items_.size(), 3));
  EXPECT_FALSE(table.Fits(items_.size() + 1, 4));
  ScoreTable short_layer = table;
  short_layer.layers[3].correct.pop_back();
  EXPECT_FALSE(short_layer.Fits(items_.size(), 4));
  ScoreTable short_teacher = table;
  short_teacher.teacher.kl_sum.pop_back();
  EXPECT_FALSE(short_teacher.Fits(items_.size(), 4));
  ScoreTable part = table;
  part.layers.resize(2);
  EXPECT_TRUE(part.Fits(items_.size(), 4));
}

TEST_F(ScoreTest, SummaryOfKnownNumbers) {
  ScoreItems items;
  items.text = {RandomBatch(config_, {11}, "x"),
                RandomBatch(config_, {21}, "y")};                          // 10 and 20 targets
  items.recall = {RecallBatch({1, 2}, {3, 4}), RecallBatch({1, 2}, {3})};  // 2 and 1 targets
  ItemValues values;
  values.loss_sum = {12, 18, 2 * std::log(2.0), std::log(4.0)};
  values.correct = {0, 0, 2, 0};
  values.kl_sum = {1, 2, 3, 4};
  const ModelScore score = Summarise(items, values);
  EXPECT_NEAR(score.text, std::exp(-1.0), 1e-12);
  EXPECT_NEAR(score.recall, (0.5 + 0.25) / 2, 1e-12);
  EXPECT_NEAR(score.exact, 0.5, 1e-12);
  EXPECT_NEAR(score.kl, 10.0 / (11 + 21 + 4 + 3), 1e-12);
  // Sample variance of {0.5, 0.25} is 1/32, of the mean 1/64.
  EXPECT_NEAR(score.recall_error, 0.125, 1e-12);
  // Residuals of the loss 12 - 10 and 18 - 20: sqrt((4 + 4) * 2 / 1) / 30 times C.
  EXPECT_NEAR(score.text_error, std::exp(-1.0) * 4 / 30, 1e-12);
  // A resample of the first text twice and the second recall item twice.
  const ModelScore again = Summarise(items, values, {2, 0, 0, 2});
  EXPECT_NEAR(again.text, std::exp(-1.2), 1e-12);
  EXPECT_NEAR(again.recall, 0.25, 1e-12);
}

TEST_F(ScoreTest, BootstrapKeepsAClearLayerAlwaysAndForcedOnesToo) {
  ScoreItems items;
  for (int i = 0; i < 8; ++i) items.text.push_back(RandomBatch(config_, {11}, std::to_string(i)));
  for (int i = 0; i < 8; ++i) items.recall.push_back(RecallBatch({1, 2}, {3}));
  PhiloxStream rng("v1|5|halo_test||0|bootstrap|");
  ScoreTable table;
  const auto values = [&](double recall_loss) {
    ItemValues v;
    for (size_t i = 0; i < items.size(); ++i) {
      const bool text = i < items.text.size();
      v.loss_sum.push_back((text ? 10.0 : recall_loss) * (1 + 0.1 * rng.NextDouble()));
      v.correct.push_back(0);
      v.kl_sum.push_back(0.1);
    }
    return v;
  };
  table.teacher = values(0.1);
  table.layers = {values(0.1), values(5.0), values(0.1), values(0.1)};
  KeepRule rule;
  rule.selector = Selector::kRecallDrop;
  rule.forced = {3};
  rule.count = 3;
  const std::vector<double> shares = BootstrapShares(items, table, rule, 50, 1);
  EXPECT_EQ(shares[1], 1.0);
  EXPECT_EQ(shares[3], 1.0);
  EXPECT_NEAR(shares[0] + shares[2], 1.0, 1e-12);
  EXPECT_EQ(shares, BootstrapShares(items, table, rule, 50, 1));
}

TEST_F(ScoreTest, LogitScaleIsFittedOnLongDocumentsWithFrozenWeights) {
  model::ModelConfig config = config_;
  config.attn_use_rope = false;
  const model::Model model(config, teacher_);
  const std::vector<float> before = testing::Bits(teacher_);
  const model::Batch packed = RandomBatch(config, {40, 7, 33}, "long");
  const std::vector<model::Batch> documents =
      LongDocuments({packed, RandomBatch(config, {12}, "short")}, 30);
  ASSERT_EQ(documents.size(), 2u);
  EXPECT_EQ(documents[1].size(), 0);
  EXPECT_EQ(documents[0].cu_seqlens, (std::vector<int32_t>{0, 40, 73}));
  EXPECT_TRUE(std::equal(packed.tokens.begin() + 47, packed.tokens.end(),
                         documents[0].tokens.begin() + 40, documents[0].tokens.end()));
  EXPECT_EQ(documents[0].positions[40], 0);

  const auto fit = FitLogitScale(ctx_, arena_, model, documents, {8, 64}, *mesh_);
  ASSERT_TRUE(fit.ok());
  ASSERT_EQ(fit->losses.size(), 3u);
  const double expected =
      model::EvaluateCrossEntropy(ctx_, arena_, model, documents[0], {.logit_scale_base = 64})
          .loss_sum;
  EXPECT_NEAR(fit->losses[2], expected / (39 + 32), 1e-12);
  EXPECT_NE(fit->losses[1], fit->losses[0]);
  const size_t best = static_cast<size_t>(std::min_element(fit->losses.begin(), fit->losses.end()) -
                                          fit->losses.begin());
  EXPECT_EQ(fit->base, fit->candidates[best]);
  EXPECT_EQ(testing::Bits(teacher_), before);

  const auto none = FitLogitScale(ctx_, arena_, model, {}, {8, 64}, *mesh_);
  ASSERT_TRUE(none.ok());
  EXPECT_EQ(none->base, 0);
  EXPECT_EQ(none->targets, 0);
}

}  // namespace
}  // namespace sala::recipes
