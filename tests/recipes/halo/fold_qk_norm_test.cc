#include "recipes/halo/fold_qk_norm.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "recipes/hf_config.h"
#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using testing::RandomBatch;
using testing::RandomTeacher;
using testing::TeacherConfig;
using testing::Values;

std::string Prefix(int64_t layer) {
  return "model.layers." + std::to_string(layer) + ".self_attn.";
}

class FoldQkNormTest : public testing::HaloTest {
 protected:
  std::vector<float> Hidden(Hybrid& hybrid, const model::Batch& batch) {
    const ArenaScope scope(arena_);
    const model::Model model(hybrid.config, hybrid.params);
    return Values(model.ForwardOnly(ctx_, arena_, batch, {}));
  }

  std::vector<QkScales> Measure(Hybrid& hybrid, const std::vector<model::Batch>& batches) {
    const model::Model model(hybrid.config, hybrid.params);
    auto scales = MeasureQkScales(ctx_, arena_, model, batches, *mesh_);
    EXPECT_TRUE(scales.ok()) << MessageOf(scales.status());
    return std::move(scales).value();
  }
};

// The largest difference, in units of the largest number of `a`.
double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0;
  double size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(a[i]) - b[i]));
    size = std::max(size, std::abs(static_cast<double>(a[i])));
  }
  return difference / size;
}

// Queries and keys of one length for every token: heads as wide as the stream, each a permutation
// of it times a number of its own, behind a norm without gain. With so small an epsilon the norm
// gives every token the same length.
Hybrid ConstantRmsTeacher() {
  model::ModelConfig config = TeacherConfig();
  config.head_dim = config.hidden_size;
  config.lightning_head_dim = 0;
  config.rms_norm_eps = 1e-30;
  EXPECT_TRUE(config.Resolve().ok());
  Hybrid teacher{config, RandomTeacher(config)};
  PhiloxStream rng("v1|5|halo_test||0|permutations|");
  const int64_t width = config.hidden_size;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    const Tensor gain =
        teacher.params.Get("model.layers." + std::to_string(layer) + ".input_layernorm.weight");
    std::fill_n(gain.Data<float>(), width, 1.0F);
    for (const char* name : {"q_proj.weight", "k_proj.weight"}) {
      const Tensor weight = teacher.params.Get(Prefix(layer) + name);
      std::fill_n(weight.Data<float>(), weight.numel(), 0.0F);
      for (int64_t head = 0; head < weight.dim(0) / width; ++head) {
        const auto scale = static_cast<float>(0.5 + 0.7 * static_cast<double>(head) +
                                              0.1 * static_cast<double>(layer));
        std::vector<int64_t> order(static_cast<size_t>(width));
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
        for (size_t i = order.size() - 1; i > 0; --i)
          std::swap(order[i], order[rng.Bounded(i + 1)]);
        for (int64_t row = 0; row < width; ++row) {
          weight.Row<float>(head * width + row)[order[static_cast<size_t>(row)]] =
              rng.Bounded(2) == 0 ? scale : -scale;
        }
      }
    }
  }
  return teacher;
}

// Four query heads of four lengths over two shared key heads, rotary embedding on.
TEST_F(FoldQkNormTest, IsExactWhereEveryTokensRmsIsTheSame) {
  Hybrid teacher = ConstantRmsTeacher();
  const model::Batch batch = RandomBatch(teacher.config, {40, 17}, "fold");
  const std::vector<float> before = Hidden(teacher, batch);
  const std::vector<QkScales> scales = Measure(teacher, {batch});
  for (size_t layer = 0; layer < scales.size(); ++layer) {
    for (size_t head = 0; head < 4; ++head) {
      // A ratio of sums of numbers that float32 rounds at 6e-8, of a norm rounded likewise.
      const double length =
          0.5 + 0.7 * static_cast<double>(head) + 0.1 * static_cast<double>(layer);
      EXPECT_NEAR(scales[layer].q[head] * length, 1.0, 1e-6) << layer << " " << head;
      if (head < 2) {
        EXPECT_NEAR(scales[layer].k[head] * length, 1.0, 1e-6) << layer << " " << head;
      }
    }
  }
  Hybrid folded = FoldQkNorm(teacher, scales);
  EXPECT_FALSE(folded.config.attn_qk_norm);
  // Queries and keys round at 6e-8 in three places more or less; a logit is a sum of 24 of their
  // products, at most some 10, so it moves by 1e-5 at worst and its exponential with it, in each of
  // four layers. A gain left out or heads in another order change 1e-2 and more (below).
  EXPECT_LT(Distance(before, Hidden(folded, batch)), 4e-5);

  std::vector<QkScales> reversed = scales;
  for (QkScales& layer : reversed) std::reverse(layer.q.begin(), layer.q.end());
  Hybrid wrong = FoldQkNorm(teacher, reversed);
  EXPECT_GT(Distance(before, Hidden(wrong, batch)), 1e-2);
  reversed = scales;
  for (QkScales& layer : reversed) std::reverse(layer.k.begin(), layer.k.end());
  wrong = FoldQkNorm(teacher, reversed);
  EXPECT_GT(Distance(before, Hidden(wrong, batch)), 1e-2);
}

TEST_F(FoldQkNormTest, GivesTheLeastSquaresFactorOfTheModelItself) {
  const model::ModelConfig teacher_config = TeacherConfig();
  const model::ParameterStore teacher = RandomTeacher(teacher_config);
  Hybrid hybrid = AssembleHybrid(teacher_config, teacher,
                                 TransferMixers(teacher_config, teacher, {.seed = 3}), {1, 3});
  const std::vector<model::Batch> batches = {RandomBatch(teacher_config, {12, 9}, "a"),
                                             RandomBatch(teacher_config, {30}, "b"),
                                             RandomBatch(teacher_config, {}, "none")};
  const std::vector<QkScales> scales = Measure(hybrid, batches);
  ASSERT_EQ(scales.size(), 4u);
  EXPECT_TRUE(scales[0].q.empty());
  EXPECT_TRUE(scales[2].k.empty());

  const model::ModelConfig& config = hybrid.config;
  const int64_t d = config.head_dim;
  std::vector<QkScales> sums(4), squares_of(4);
  for (const int64_t layer : {1, 3}) {
    sums[static_cast<size_t>(layer)] = {std::vector<double>(4, 0.0), std::vector<double>(2, 0.0)};
    squares_of[static_cast<size_t>(layer)] = sums[static_cast<size_t>(layer)];
  }
  for (const model::Batch& batch : batches) {
    const ArenaScope scope(arena_);
    const model::Model model(config, hybrid.params);
    const auto hook = [&](int64_t layer, const ConstTensor& normed, const ConstTensor&) {
      for (const char* name : {"q", "k"}) {
        auto& of_layer = sums[static_cast<size_t>(layer)];
        auto& squares_of_layer = squares_of[static_cast<size_t>(layer)];
        std::vector<double>& heads = *name == 'q' ? of_layer.q : of_layer.k;
        std::vector<double>& square_heads = *name == 'q' ? squares_of_layer.q : squares_of_layer.k;
        const ConstTensor weight = hybrid.params.Get(Prefix(layer) + name + "_proj.weight");
        for (int64_t t = 0; t < normed.dim(0); ++t) {
          for (size_t head = 0; head < heads.size(); ++head) {
            double squares = 0;
            for (int64_t row = 0; row < d; ++row) {
              const float* w = weight.Row<float>(static_cast<int64_t>(head) * d + row);
              double sum = 0;
              for (int64_t i = 0; i < config.hidden_size; ++i)
                sum += static_cast<double>(w[i]) * normed.Row<float>(t)[i];
              squares += sum * sum;
            }
            const double mean_square = squares / static_cast<double>(d) + config.rms_norm_eps;
            heads[head] += std::sqrt(mean_square);
            square_heads[head] += mean_square;
          }
        }
      }
    };
    model.ForwardOnly(ctx_, arena_, batch, {}, 0, {}, hook);
  }
  for (const size_t layer : {1, 3}) {
    for (size_t head = 0; head < 4; ++head) {
      // float32 projections of 24 terms: 24 * 6e-8 at worst, and nothing cancels in the sums.
      EXPECT_NEAR(scales[layer].q[head] / sums[layer].q[head] * squares_of[layer].q[head], 1.0,
                  1.5e-6);
      if (head < 2) {
        EXPECT_NEAR(scales[layer].k[head] / sums[layer].k[head] * squares_of[layer].k[head], 1.0,
                    1.5e-6);
      }
    }
  }
}

TEST_F(FoldQkNormTest, ChangesSoftmaxProjectionsAloneAndCanBeExported) {
  const model::ModelConfig config = TeacherConfig();
  const model::ParameterStore teacher = RandomTeacher(config);
  Hybrid hybrid =
      AssembleHybrid(config, teacher, TransferMixers(config, teacher, {.seed = 3}), {0, 3});
  hybrid = EnterHype(std::move(hybrid), {.remove_rope = true, .add_gate = true, .seed = 1});
  EXPECT_EQ(ErrorCodeOf(HfConfig(hybrid.config).status()), "EXP-QKNORM");
  const std::vector<QkScales> scales = Measure(hybrid, {RandomBatch(config, {30}, "fold")});
  Hybrid folded = FoldQkNorm(hybrid, scales);
  EXPECT_TRUE(HfConfig(folded.config).ok());
  EXPECT_EQ(folded.params.specs().size() + 4, hybrid.params.specs().size());
  int64_t changed = 0;
  for (const model::ParameterSpec& spec : folded.params.specs()) {
    const bool same = Values(folded.params.Get(spec.name)) == Values(hybrid.params.Get(spec.name));
    changed += same ? 0 : 1;
    const bool softmax = spec.name.find("layers.0.self_attn.") != std::string::npos ||
                         spec.name.find("layers.3.self_attn.") != std::string::npos;
    const bool projection = spec.name.find("q_proj") != std::string::npos ||
                            spec.name.find("k_proj") != std::string::npos;
    EXPECT_EQ(same, !(softmax && projection)) << spec.name;
  }
  EXPECT_EQ(changed, 4);
  EXPECT_TRUE(folded.params.Has(Prefix(1) + "q_norm.weight"));  // linear layers keep their norm
}

TEST_F(FoldQkNormTest, SavedFactorsAreTheSameBitsAndOtherFormsAreRefused) {
  model::ModelConfig config = TeacherConfig();
  config.mixer_types[1] = NameOf(model::MixerType::kLightning);
  std::vector<QkScales> scales(4);
  for (const size_t layer : {0, 2, 3})
    scales[layer] = {{1.0 / 3, std::nextafter(0.1, 1.0), 1e-30, 7}, {1e30, M_PI}};
  const nlohmann::json saved = nlohmann::json::parse(ToJson(scales).dump());
  const auto back = QkScalesFromJson(saved, config, "here");
  ASSERT_TRUE(back.ok()) << MessageOf(back.status());
  for (size_t layer = 0; layer < 4; ++layer) {
    EXPECT_EQ((*back)[layer].q, scales[layer].q);
    EXPECT_EQ((*back)[layer].k, scales[layer].k);
  }
  nlohmann::json shorter = saved;
  shorter.erase(3);
  nlohmann::json without = saved;
  without[0].erase("k");
  nlohmann::json head = saved;
  head[0]["q"].erase(0);
  nlohmann::json linear = saved;
  linear[1]["q"] = {1.0};
  nlohmann::json text = saved;
  text[0]["q"][0] = "one";
  for (const nlohmann::json& damaged :
       {shorter, without, head, linear, text, nlohmann::json(), nlohmann::json(3)}) {
    const auto refused = QkScalesFromJson(damaged, config, "here");
    EXPECT_EQ(ErrorCodeOf(refused.status()), "CKPT-MANIFEST") << damaged;
    EXPECT_THAT(MessageOf(refused.status()), ::testing::HasSubstr("here"));
  }
}

TEST_F(FoldQkNormTest, RefusesAStudentThatDiverged) {
  const model::ModelConfig config = TeacherConfig();
  Hybrid teacher{config, RandomTeacher(config)};
  teacher.params.Get(Prefix(2) + "k_proj.weight").Data<float>()[0] =
      std::numeric_limits<float>::quiet_NaN();
  const model::Model model(teacher.config, teacher.params);
  const auto scales =
      MeasureQkScales(ctx_, arena_, model, {RandomBatch(config, {9}, "nan")}, *mesh_);
  EXPECT_EQ(ErrorCodeOf(scales.status()), "NUM-NONFINITE");
}

}  // namespace
}  // namespace sala::recipes
