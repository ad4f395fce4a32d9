#include "recipes/halo/assemble.h"

#include <cmath>

#include "model/loss.h"
#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using model::MixerType;
using testing::RandomBatch;
using testing::RandomTeacher;
using testing::TeacherConfig;
using testing::Values;

class AssembleTest : public testing::HaloTest {
 protected:
  AssembleTest()
      : config_(TeacherConfig()),
        teacher_(RandomTeacher(config_)),
        mixers_(TransferMixers(config_, teacher_, {})) {}

  std::vector<float> Hidden(Hybrid& hybrid, const model::Batch& batch) {
    const ArenaScope scope(arena_);
    const model::Model model(hybrid.config, hybrid.params);
    return Values(model.ForwardOnly(ctx_, arena_, batch, {}));
  }

  model::ModelConfig config_;
  model::ParameterStore teacher_;
  model::ParameterStore mixers_;
};

TEST_F(AssembleTest, TakesEachTensorFromItsPlace) {
  Hybrid hybrid = AssembleHybrid(config_, teacher_, mixers_, {0, 3});
  EXPECT_EQ(hybrid.config.mixer(0), MixerType::kSoftmax);
  EXPECT_EQ(hybrid.config.mixer(1), MixerType::kLightning);
  EXPECT_EQ(hybrid.config.mixer(2), MixerType::kLightning);
  EXPECT_EQ(hybrid.config.mixer(3), MixerType::kSoftmax);
  int64_t from_mixers = 0;
  for (const model::ParameterSpec& spec : hybrid.params.specs()) {
    const bool linear = spec.name.find("layers.1.self_attn.") != std::string::npos ||
                        spec.name.find("layers.2.self_attn.") != std::string::npos;
    EXPECT_EQ(Values(hybrid.params.Get(spec.name)),
              Values((linear ? mixers_ : teacher_).Get(spec.name)))
        << spec.name;
    from_mixers += linear ? 1 : 0;
  }
  EXPECT_EQ(from_mixers, 2 * 8);  // q k v o z, three norms
}

TEST_F(AssembleTest, AllLayersSoftmaxIsTheTeacher) {
  Hybrid hybrid = AssembleHybrid(config_, teacher_, mixers_, {0, 1, 2, 3});
  const model::Batch batch = RandomBatch(config_, {20, 9}, "same");
  const model::Model teacher(config_, teacher_);
  EXPECT_EQ(Hidden(hybrid, batch), Values(teacher.ForwardOnly(ctx_, arena_, batch, {})));
}

TEST_F(AssembleTest, IdentityGateKeepsTheBits) {
  const model::Batch batch = RandomBatch(config_, {33, 5}, "gate");
  Hybrid hybrid = AssembleHybrid(config_, teacher_, mixers_, {0, 2});
  const std::vector<float> before = Hidden(hybrid, batch);
  Hybrid gated = EnterHype(hybrid, {.add_gate = true, .gate_init = GateInit::kIdentity, .seed = 1});
  EXPECT_TRUE(gated.config.attn_use_output_gate);
  EXPECT_TRUE(gated.params.Has("model.layers.2.self_attn.o_gate.weight"));
  EXPECT_FALSE(gated.params.Has("model.layers.1.self_attn.o_gate.weight"));
  EXPECT_EQ(Hidden(gated, batch), before);
}

TEST_F(AssembleTest, SmallNormalGateAboutHalvesTheOutput) {
  const model::Batch batch = RandomBatch(config_, {33, 5}, "gate");
  Hybrid hybrid = AssembleHybrid(config_, teacher_, mixers_, {0, 2});
  Hybrid gated = EnterHype(hybrid, {.add_gate = true, .seed = 1});
  const Tensor gate = gated.params.Get("model.layers.0.self_attn.o_gate.weight");
  double square = 0;
  for (float g : Values(gate)) square += static_cast<double>(g) * g;
  // Standard deviation of n normal draws: relative error 1 / sqrt(2 n), five of them.
  const auto n = static_cast<double>(gate.numel());
  EXPECT_NEAR(std::sqrt(square / n) / 0.02, 1.0, 5 / std::sqrt(2 * n));
  EXPECT_EQ(Values(gated.params.Get("model.layers.0.self_attn.o_proj.weight")),
            Values(hybrid.params.Get("model.layers.0.self_attn.o_proj.weight")));
  EXPECT_NE(Hidden(gated, batch), Hidden(hybrid, batch));
  const Hybrid other = EnterHype(hybrid, {.add_gate = true, .seed = 2});
  EXPECT_NE(Values(other.params.Get("model.layers.0.self_attn.o_gate.weight")), Values(gate));
}

TEST_F(AssembleTest, WithoutRotaryEmbeddingShiftedPositionsChangeNothing) {
  model::Batch batch = RandomBatch(config_, {12}, "order");
  model::Batch warped = batch;
  for (size_t t = 0; t < warped.positions.size(); ++t)
    warped.positions[t] = static_cast<int32_t>(3 * t + t % 2);
  Hybrid with_rope = AssembleHybrid(config_, teacher_, mixers_, {0, 1, 2, 3});
  Hybrid without = EnterHype(with_rope, {.remove_rope = true});
  EXPECT_FALSE(without.config.attn_use_rope);
  EXPECT_NE(Hidden(with_rope, batch), Hidden(with_rope, warped));
  EXPECT_EQ(Hidden(without, batch), Hidden(without, warped));
  EXPECT_NE(Hidden(without, batch), Hidden(with_rope, batch));
}

TEST_F(AssembleTest, WhatIsThereStays) {
  Hybrid hybrid = EnterHype(AssembleHybrid(config_, teacher_, mixers_, {0, 2}),
                            {.remove_rope = true, .add_gate = true, .seed = 1});
  const Hybrid again =
      EnterHype(hybrid, {.remove_rope = true, .add_gate = true, .gate_init = GateInit::kIdentity});
  EXPECT_EQ(testing::Bits(again.params), testing::Bits(hybrid.params));
}

}  // namespace
}  // namespace sala::recipes
