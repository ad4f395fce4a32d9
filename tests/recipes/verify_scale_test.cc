#include "recipes/verify_scale.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "recipes/halo/settings.h"
#include "recipes/plan.h"

namespace sala::recipes {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Types = std::vector<std::string>;

// The released hybrid (docs/formats.md).
model::ModelConfig Large() {
  model::ModelConfig c;
  c.vocab_size = 73448;
  c.hidden_size = 4096;
  c.intermediate_size = 16384;
  c.num_hidden_layers = 32;
  c.num_attention_heads = 32;
  c.num_key_value_heads = 2;
  c.head_dim = 128;
  c.attn_use_rope = false;
  c.attn_use_output_gate = true;
  c.scale_emb = 12;
  c.scale_depth = 1.4;
  c.dim_model_base = 256;
  c.eos_token_id = 2;
  c.mixer_types.assign(32, "lightning-attn");
  for (const size_t layer : {0, 7, 15, 16, 21, 27, 28, 31}) c.mixer_types[layer] = "minicpm4";
  return c;
}

StageConfig Stage(const std::string& name) {
  StageConfig stage;
  stage.name = name;
  stage.tokenizer = "nowhere";
  stage.batch = {.seq_len_tokens = 32768,
                 .global_batch_tokens = 32768 * 8,
                 .micro_batch_sequences = 2,
                 .steps = 1000};
  stage.schedule = {
      .shape = ScheduleShape::kExponential, .peak_lr = 1e-3, .final_lr = 1e-4, .warmup_steps = 10};
  stage.data.mixture = {{.dataset = "nowhere/web", .min_tokens = 4096}};
  return stage;
}

HaloConfig Halo(const BatchConfig& batch) {
  HaloConfig halo;
  halo.align.batch = halo.distil.batch = batch;
  halo.align.schedule = halo.distil.schedule = {.peak_lr = 1e-3};
  halo.keep = {0, -1};
  return halo;
}

PipelineConfig Pipeline(std::vector<StageConfig> stages) {
  PipelineConfig config;
  config.name = "user";
  config.run.dir = "runs/user";
  config.stages = std::move(stages);
  return config;
}

TEST(VerifyScale, WhatAModelComputesStays) {
  const model::ModelConfig from = Large();
  const model::ModelConfig to = ScaleModel(from).value();
  EXPECT_LE(to.hidden_size, 64);
  EXPECT_LE(to.num_hidden_layers, 5);
  EXPECT_EQ(to.width_multiplier(), from.width_multiplier());
  EXPECT_EQ(to.scale_depth, from.scale_depth);
  EXPECT_EQ(to.scale_emb, from.scale_emb);
  EXPECT_EQ(to.intermediate_size / to.hidden_size, from.intermediate_size / from.hidden_size);
  EXPECT_EQ(to.attn_use_rope, from.attn_use_rope);
  EXPECT_EQ(to.attn_use_output_gate, from.attn_use_output_gate);
  EXPECT_GT(to.num_attention_heads, to.num_key_value_heads);
  EXPECT_EQ(to.lightning_nh, to.num_attention_heads);
  EXPECT_EQ(to.mixer_types.front(), "minicpm4");
  EXPECT_EQ(to.mixer_types.back(), "minicpm4");
  EXPECT_TRUE(to.has_lightning());
  EXPECT_EQ(to.CudaProblem(), "");
  EXPECT_EQ(to.TensorParallelProblem(2), "");
}

TEST(VerifyScale, AResidualFactorThatIsOffStaysOff) {
  model::ModelConfig from = Large();
  from.scale_depth = std::sqrt(32.0);
  EXPECT_DOUBLE_EQ(ScaleModel(from).value().residual_scale(), 1.0);
}

TEST(VerifyScale, ASmallModelKeepsItsSizes) {
  model::ModelConfig from = Large();
  from.hidden_size = 32;
  from.intermediate_size = 40;
  from.num_hidden_layers = 2;
  from.mixer_types = {"lightning-attn", "minicpm4"};
  from.num_attention_heads = 3;
  from.num_key_value_heads = 1;
  from.lightning_nh = 2;
  from.head_dim = 8;
  from.tie_word_embeddings = true;
  const model::ModelConfig to = ScaleModel(from).value();
  EXPECT_EQ(to.hidden_size, 32);
  EXPECT_EQ(to.intermediate_size, 40);
  EXPECT_EQ(to.mixer_types, from.mixer_types);
  EXPECT_EQ(to.num_attention_heads, 3);
  EXPECT_EQ(to.lightning_nh, 2);
  EXPECT_EQ(to.head_dim, 8);
  EXPECT_TRUE(to.tie_word_embeddings);
}

TEST(VerifyScale, MixersKeepEndsAndShare) {
  const auto scaled = [](const Types& types) { return ScaleMixers(types, 5); };
  const std::string s = "minicpm4";
  const std::string l = "lightning-attn";
  EXPECT_THAT(scaled(Types(40, s)), ElementsAre(s, s, s, s, s));
  EXPECT_THAT(scaled(Types(40, l)), ElementsAre(l, l, l, l, l));
  Types few(40, l);
  few[20] = s;  // a single one does not vanish
  EXPECT_THAT(scaled(few), ElementsAre(l, l, s, l, l));
  Types most(40, s);
  most[20] = l;  // neither does a single linear one
  const Types many = scaled(most);
  EXPECT_EQ(std::count(many.begin(), many.end(), l), 1);
  EXPECT_EQ(ScaleMixers({s, l, s}, 3), Types({s, l, s}));
}

TEST(VerifyScale, LayersAreNamedInTheSmallModel) {
  EXPECT_THAT(ScaleLayers({0, -1}, 32, 5), ElementsAre(0, 4));
  EXPECT_THAT(ScaleLayers({0, 1, 16, 31}, 32, 5), ElementsAre(0, 2, 4));
  EXPECT_THAT(ScaleLayers({1, 2}, 4, 4), ElementsAre(1, 2));
  EXPECT_THAT(ScaleLayers({0}, 1, 1), ElementsAre(0));
}

TEST(VerifyScale, SelectionDropsBlocksInEveryConfiguration) {
  const std::vector<kernels::SparseAttentionConfig> configs = {
      {},  // the released one
      {.kernel_size = 8, .kernel_stride = 4, .block_size = 16, .window_size = 48, .topk = 5},
      {.kernel_size = 64, .kernel_stride = 32, .block_size = 32, .window_size = 0, .topk = 2},
      {.kernel_size = 2, .kernel_stride = 1, .block_size = 64, .init_blocks = 4, .topk = 200},
      {.kernel_size = 32,
       .kernel_stride = 16,
       .block_size = 48,
       .window_size = 96,
       .dense_len = 0}};
  for (const kernels::SparseAttentionConfig& from : configs) {
    const kernels::SparseAttentionConfig to = ScaleSparse(from);
    ASSERT_EQ(kernels::SparseConfigProblem(to), "") << from.block_size;
    EXPECT_EQ(to.block_size / to.kernel_stride, from.block_size / from.kernel_stride);
    EXPECT_EQ(to.free_blocks() > 0, from.free_blocks() > 0);
    EXPECT_EQ(to.window_size > 0, from.window_size > 0);
    EXPECT_LE(to.total_blocks(), std::min<int64_t>(from.total_blocks(), 12));

    StageConfig stage = Stage("long");
    stage.sparse_attention = true;
    stage.model = Large();
    static_cast<kernels::SparseAttentionConfig&>(stage.model->sparse) = from;
    const ScaledPipeline scaled = ScalePipeline(Pipeline({stage}), *stage.model, "data").value();
    const int64_t length = scaled.config.stages[0].batch.seq_len_tokens;
    EXPECT_GE(length, to.dense_len);
    EXPECT_GT(length / to.block_size, to.total_blocks());
    ASSERT_EQ(scaled.datasets.size(), 1U);
    EXPECT_EQ(scaled.datasets[0].long_max, length);
  }
}

TEST(VerifyScale, SettingsOfAStageStayAndSizesShrink) {
  StageConfig stage = Stage("stable");
  stage.model = Large();
  stage.recompute = false;
  stage.optimizer.clip_norm = 0.7;
  stage.parallel = {.cp = 4, .tp = 8, .zero_stage = 3};
  stage.batch.global_batch_tokens = 32768 * 7;  // the last micro-batch is smaller
  stage.data.packing = data::Packing::kOnePerSample;
  stage.data.validation.fraction = 0.001;
  const ScaledPipeline scaled = ScalePipeline(Pipeline({stage}), *stage.model, "data").value();
  const StageConfig& to = scaled.config.stages[0];
  EXPECT_EQ(to.batch.steps, kVerifySteps);
  EXPECT_EQ(to.batch.global_batch_sequences(), 3);
  EXPECT_EQ(to.batch.micro_batch_sequences, 2);
  EXPECT_EQ(to.schedule.shape, ScheduleShape::kExponential);
  EXPECT_EQ(to.schedule.peak_lr, 1e-3);
  EXPECT_EQ(to.schedule.warmup_steps, 1);
  EXPECT_EQ(to.optimizer.clip_norm, 0.7);
  EXPECT_FALSE(to.recompute);
  EXPECT_EQ(to.data.packing, data::Packing::kOnePerSample);
  EXPECT_GE(to.data.validation.fraction, 0.1);
  EXPECT_EQ(to.tokenizer, "bytes");
  EXPECT_EQ(to.parallel.cp, 1) << "runs of one rank first";
  EXPECT_EQ(to.parallel.zero_stage, 3);
  ASSERT_EQ(scaled.meshes.size(), 1U);
  EXPECT_EQ(scaled.meshes[0].cp, 2);
  EXPECT_EQ(scaled.meshes[0].tp, 2);
  EXPECT_THAT(scaled.changes, ::testing::Contains(HasSubstr("cp 4 -> 2, tp 8 -> 2")));
}

TEST(VerifyScale, ADatasetOfChatHasAMask) {
  StageConfig text = Stage("text");
  text.model = Large();
  StageConfig chat = Stage("chat");
  chat.kind = StageKind::kSft;
  chat.data.mixture = {{.dataset = "nowhere/chat"}, {.dataset = "nowhere/web"}};
  const ScaledPipeline scaled = ScalePipeline(Pipeline({text, chat}), *text.model, "data").value();
  ASSERT_EQ(scaled.datasets.size(), 2U);
  EXPECT_TRUE(scaled.datasets[0].chat);
  EXPECT_TRUE(scaled.datasets[1].chat) << "read by a chat stage too";
  EXPECT_EQ(scaled.config.stages[0].data.mixture[0].dataset,
            scaled.config.stages[1].data.mixture[1].dataset);
}

TEST(VerifyScale, HaloStillHasAChoice) {
  for (const int64_t layers : {3, 8, 32}) {
    model::ModelConfig teacher = Large();
    teacher.num_hidden_layers = layers;
    teacher.mixer_types.clear();
    teacher.attn_use_rope = true;
    teacher.attn_use_output_gate = false;
    StageConfig base = Stage("base");
    base.model = teacher;
    StageConfig halo = Stage("halo");
    halo.kind = StageKind::kHalo;
    halo.halo = Halo(halo.batch);
    halo.halo->softmax_layers = layers == 3 ? 2 : 0;
    halo.halo->selector = Selector::kKlSwap;
    halo.data.validation.fraction = 0.01;
    const ScaledPipeline scaled = ScalePipeline(Pipeline({base, halo}), teacher, "data").value();
    const auto plan = PlanHalo(scaled.config.stages[1], scaled.start);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(plan->forced, std::vector<int64_t>({0, scaled.start.num_hidden_layers - 1}));
    EXPECT_LT(plan->softmax_layers, scaled.start.num_hidden_layers);
    // Of 32 layers 8 stay softmax: six are chosen. Of 8 and of 3 the two that are kept are all.
    EXPECT_EQ(plan->softmax_layers, layers == 32 ? 3 : 2);
    model::ModelConfig model = scaled.start;
    for (const StageConfig& stage : scaled.config.stages)
      EXPECT_TRUE(PlanStage(stage, scaled.config.run, 1, &model).ok());
  }
}

TEST(VerifyScale, ExplicitLayersAreThoseOfTheSmallModel) {
  model::ModelConfig teacher = Large();
  teacher.mixer_types.clear();
  StageConfig base = Stage("base");
  base.model = teacher;
  StageConfig halo = Stage("halo");
  halo.kind = StageKind::kHalo;
  halo.halo = Halo(halo.batch);
  halo.halo->selector = Selector::kExplicit;
  halo.halo->explicit_layers = {15, 16, 20};
  halo.halo->softmax_layers = 5;
  const ScaledPipeline scaled = ScalePipeline(Pipeline({base, halo}), teacher, "data").value();
  EXPECT_TRUE(PlanHalo(scaled.config.stages[1], scaled.start).ok());
}

TEST(VerifyScale, WeightsFromElsewhereBecomeAStageBefore) {
  StageConfig stage = Stage("long");
  stage.init_from = InitConfig{.path = "nowhere/step-1", .carry_optimizer = true};
  PipelineConfig config = Pipeline({stage});
  config.single_stage = true;
  const ScaledPipeline scaled = ScalePipeline(config, Large(), "data").value();
  ASSERT_EQ(scaled.config.stages.size(), 2U);
  EXPECT_EQ(scaled.meshes.size(), 2U);
  EXPECT_TRUE(scaled.config.stages[0].model.has_value());
  EXPECT_FALSE(scaled.config.stages[1].init_from.has_value());
  EXPECT_TRUE(scaled.config.stages[1].carry_optimizer);
  EXPECT_FALSE(scaled.config.single_stage);
}

TEST(VerifyScale, AContradictoryModelIsAnError) {
  model::ModelConfig from = Large();
  from.num_key_value_heads = 5;
  EXPECT_EQ(ErrorCodeOf(ScaleModel(from).status()), "CFG-MODEL");
}

}  // namespace
}  // namespace sala::recipes
