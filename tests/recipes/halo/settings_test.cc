#include "recipes/halo/settings.h"

#include <gmock/gmock.h>

#include "tests/recipes/halo/tiny.h"

namespace sala::recipes {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

StageConfig Stage() {
  StageConfig stage;
  stage.kind = StageKind::kHalo;
  stage.data.validation.fraction = 0.1;
  stage.halo.emplace();
  return stage;
}

model::ModelConfig Teacher(int64_t layers) {
  model::ModelConfig config = testing::TeacherConfig();
  config.num_hidden_layers = layers;
  config.mixer_types.clear();
  config.attn_qk_norm = false;  // as a minicpm has it
  EXPECT_TRUE(config.Resolve().ok());
  return config;
}

void ExpectRefused(const StageConfig& stage, const std::string& text) {
  const auto plan = PlanHalo(stage, Teacher(32));
  EXPECT_EQ(ErrorCodeOf(plan.status()), "CFG-HALO");
  EXPECT_EQ(ExitCodeOf(plan.status()), ExitCode::kConfig);
  EXPECT_THAT(MessageOf(plan.status()), HasSubstr(text));
}

TEST(HaloPlan, QuarterOfTheLayersWithTheForcedOnes) {
  StageConfig stage = Stage();
  stage.halo->keep = {0, -1};
  const auto plan = PlanHalo(stage, Teacher(32));
  ASSERT_TRUE(plan.ok()) << MessageOf(plan.status());
  EXPECT_EQ(plan->softmax_layers, 8);
  EXPECT_THAT(plan->forced, ElementsAre(0, 31));
  EXPECT_EQ(PlanHalo(Stage(), Teacher(6))->softmax_layers, 1);
}

TEST(HaloPlan, ExplicitLayersAreCountedWithTheForcedOnes) {
  StageConfig stage = Stage();
  stage.halo->selector = Selector::kExplicit;
  stage.halo->keep = {0};
  stage.halo->explicit_layers = {0, 9, -1};
  stage.halo->score.recall_items = 0;
  const auto plan = PlanHalo(stage, Teacher(32));
  ASSERT_TRUE(plan.ok()) << MessageOf(plan.status());
  EXPECT_EQ(plan->softmax_layers, 3);
  stage.halo->softmax_layers = 8;
  ExpectRefused(stage, "halo.softmax_layers says 8");
}

TEST(HaloPlan, RefusesContradictions) {
  StageConfig stage = Stage();
  stage.halo->keep = {0, 40};
  ExpectRefused(stage, "halo.keep names layer 40");

  stage = Stage();
  stage.halo->keep = {0, 1, 2};
  stage.halo->softmax_layers = 2;
  ExpectRefused(stage, "halo.keep names 3 layers, but only 2");

  stage = Stage();
  stage.halo->softmax_layers = 33;
  ExpectRefused(stage, "halo.softmax_layers is 33");

  for (Selector selector : {Selector::kHalo, Selector::kRecallDrop, Selector::kDifference}) {
    stage = Stage();
    stage.halo->selector = selector;
    stage.halo->score.recall_items = 0;
    ExpectRefused(stage, "halo.score.recall_items is 0");
  }
  stage.halo->selector = Selector::kKlSwap;
  EXPECT_TRUE(PlanHalo(stage, Teacher(32)).ok());
  stage.data.validation.fraction = 0;
  ExpectRefused(stage, "data.validation.fraction is 0");
  stage.halo->selector = Selector::kUniform;
  EXPECT_TRUE(PlanHalo(stage, Teacher(32)).ok());

  stage = Stage();
  stage.halo->logit_scale_grid = {8, 64};
  ExpectRefused(stage, "halo.logit_scale_length_tokens");
  stage.halo->logit_scale_length_tokens = 256;
  EXPECT_TRUE(PlanHalo(stage, Teacher(32)).ok());
  stage.halo->logit_scale_grid = {1};
  ExpectRefused(stage, "halo.logit_scale_grid");
}

TEST(HaloWarnings, NameFrozenLayersThatChange) {
  const HaloPlan plan{.softmax_layers = 2, .forced = {0}, .explicit_layers = {}};
  const auto warnings = [&plan](const HaloConfig& halo) {
    return HaloWarnings(halo, plan, Teacher(8));
  };
  HaloConfig halo;
  EXPECT_THAT(warnings(halo), IsEmpty());
  halo.nope_at = HaloMoment::kDistil;
  EXPECT_THAT(warnings(halo), ElementsAre(HasSubstr("nope_at")));
  halo.trainable = HaloTrainable::kAll;
  EXPECT_THAT(warnings(halo), IsEmpty());
  halo.trainable = HaloTrainable::kLinearMixers;
  halo.nope_at = HaloMoment::kNextStage;
  halo.softmax_gate_at = HaloMoment::kDistil;
  EXPECT_THAT(warnings(halo), ElementsAre(HasSubstr("softmax_gate_at")));
  halo.softmax_gate_init = GateInit::kIdentity;
  EXPECT_THAT(warnings(halo), IsEmpty());
  // The teacher of these tests has no norm that could be folded.
  halo.qk_norm_fold_at = HaloMoment::kDistil;
  EXPECT_THAT(warnings(halo), IsEmpty());
  model::ModelConfig normed = Teacher(8);
  normed.attn_qk_norm = true;
  EXPECT_THAT(HaloWarnings(halo, plan, normed), ElementsAre(HasSubstr("qk_norm_fold_at")));
  halo.softmax_qk_norm = QkNormForm::kKeep;
  EXPECT_THAT(HaloWarnings(halo, plan, normed), ElementsAre(HasSubstr("EXP-QKNORM")));
}

TEST(HaloWarnings, NameALinearLayer0AndAStudentWithoutSoftmax) {
  const auto warnings = [](const StageConfig& stage, int64_t layers) {
    return HaloWarnings(*stage.halo, *PlanHalo(stage, Teacher(layers)), Teacher(layers));
  };
  StageConfig stage = Stage();
  EXPECT_THAT(warnings(stage, 8), ElementsAre(HasSubstr("layer 0 may become linear")));
  stage.halo->softmax_layers = 8;  // nothing is converted
  EXPECT_THAT(warnings(stage, 8), IsEmpty());
  stage.halo->softmax_layers = 0;
  EXPECT_THAT(warnings(stage, 3), ElementsAre(HasSubstr("no layer keeps softmax attention"),
                                              HasSubstr("layer 0 may become linear")));
  stage.halo->keep = {-8};
  EXPECT_THAT(warnings(stage, 8), IsEmpty());

  stage.halo->keep = {-1};
  stage.halo->selector = Selector::kExplicit;
  stage.halo->explicit_layers = {3};
  EXPECT_THAT(warnings(stage, 8), ElementsAre(HasSubstr("layer 0 may become linear")));
  stage.halo->explicit_layers = {3, 0};
  EXPECT_THAT(warnings(stage, 8), IsEmpty());
}

TEST(HaloWarnings, SayThatAHybridWithQueryKeyNormCannotBeExported) {
  StageConfig stage = Stage();
  stage.halo->keep = {0};
  model::ModelConfig teacher = Teacher(8);
  teacher.attn_qk_norm = true;
  const HaloPlan plan = *PlanHalo(stage, teacher);
  EXPECT_THAT(HaloWarnings(*stage.halo, plan, teacher), IsEmpty());  // folded by default
  stage.halo->softmax_qk_norm = QkNormForm::kKeep;
  EXPECT_THAT(HaloWarnings(*stage.halo, plan, teacher), ElementsAre(HasSubstr("EXP-QKNORM")));
}

TEST(HaloPhase, DefaultsToOneRateForAllTensorsAndNoDecay) {
  const HaloPhaseConfig phase;
  EXPECT_EQ(phase.optimizer.weight_decay, 0);
  for (double multiplier :
       {phase.optimizer.matrix_lr_multiplier, phase.optimizer.embedding_lr_multiplier,
        phase.optimizer.vector_lr_multiplier, phase.optimizer.head_lr_multiplier,
        phase.optimizer.mixer_lr_multiplier}) {
    EXPECT_EQ(multiplier, 1);
  }
}

}  // namespace
}  // namespace sala::recipes
