#include "recipes/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "core/rng.h"
#include "model/loss.h"
#include "model/units.h"
#include "recipes/halo/transfer.h"
#include "recipes/plan_pass.h"
#include "recipes/resident_plan.h"

namespace sala::recipes {
namespace {

model::ModelConfig SmallModel() {
  model::ModelConfig config;
  config.vocab_size = 90;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_hidden_layers = 4;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.mixer_types = {"minicpm4", "lightning-attn", "lightning-attn", "minicpm4"};
  config.sparse = {};
  config.sparse.kernel_size = 8;
  config.sparse.kernel_stride = 4;
  config.sparse.block_size = 16;
  config.sparse.init_blocks = 1;
  config.sparse.window_size = 16;
  config.sparse.topk = 2;
  config.sparse.dense_len = 32;
  return config;
}

PlanInput Input(const model::ModelConfig& model, parallel::MeshConfig mesh = {.dp = 1}) {
  PlanInput input;
  input.model = model;
  SALA_CHECK(input.model.Resolve().ok());
  input.batch = {
      .seq_len_tokens = 64, .global_batch_tokens = 64 * 8, .micro_batch_sequences = 2, .steps = 1};
  input.mesh = mesh;
  return input;
}

model::Batch BatchOf(const std::vector<int32_t>& cu_seqlens, int64_t vocabulary) {
  model::Batch batch;
  PhiloxStream rng("v1|1|plan_test||0|tokens|");
  for (size_t s = 1; s < cu_seqlens.size(); ++s) {
    for (int32_t i = 0; i < cu_seqlens[s] - cu_seqlens[s - 1]; ++i) {
      batch.tokens.push_back(static_cast<int32_t>(rng.Bounded(static_cast<uint64_t>(vocabulary))));
      batch.labels.push_back(static_cast<int32_t>(rng.Bounded(static_cast<uint64_t>(vocabulary))));
      batch.positions.push_back(i);
    }
  }
  batch.cu_seqlens = cu_seqlens;
  return batch;
}

struct Peaks {
  size_t arena, scratch;
};

// What a real micro-batch on one rank takes.
Peaks Measure(const PlanInput& input, const std::vector<int32_t>& cu_seqlens) {
  model::ParameterStore params(model::ParameterSpecs(input.model));
  model::InitialiseParameters(input.model, 1, params);
  model::ParameterStore gradients(params.specs());
  const model::Model model(input.model, params);
  ThreadPool pool(static_cast<int>(input.threads));
  Arena arena, scratch;
  const Context ctx{.pool = &pool, .scratch = &scratch};
  const model::Batch batch = BatchOf(cu_seqlens, input.model.vocab_size);
  const model::RunOptions options{.sparse_attention = input.sparse_attention,
                                  .recompute = input.recompute};
  if (input.phase == PlanPhase::kDistil) {
    model::ParameterStore teacher_params(model::ParameterSpecs(input.teacher));
    model::InitialiseParameters(input.teacher, 2, teacher_params);
    const model::Model teacher(input.teacher, teacher_params);
    model::DistillationStep(ctx, arena, teacher, model, batch,
                            {.student = options,
                             .teacher = {},
                             .kl_grad_scale = 1,
                             .ce_grad_scale = input.cross_entropy ? 1.0F : 0.0F,
                             .temperature = 1},
                            model::BindTensors(input.model, gradients));
  } else {
    model::CrossEntropyStep(ctx, arena, model, batch, options, 1,
                            model::BindTensors(input.model, gradients));
  }
  return {arena.peak_bytes(), scratch.peak_bytes()};
}

void ExpectPeaks(const PlanInput& input, const std::vector<int32_t>& cu_seqlens,
                 const std::string& what) {
  PassContext at(input, 0);
  at.enter = at.enter_teacher = [](int64_t) {};
  PassMicroBatch(at, cu_seqlens);
  const Peaks peaks = Measure(input, cu_seqlens);
  EXPECT_EQ(at.arena.peak(), static_cast<int64_t>(peaks.arena)) << what;
  EXPECT_EQ(at.scratch.peak(), static_cast<int64_t>(peaks.scratch)) << what;
}

TEST(PlanTest, PeaksOfTheArenasAreThoseOfAMicroBatch) {
  const std::vector<std::vector<int32_t>> batches = {
      {0, 64}, {0, 17, 20, 128}, {0, 1}, {0, 300, 700}};
  for (int bits = 0; bits < 64; ++bits) {
    model::ModelConfig model = SmallModel();
    model.tie_word_embeddings = (bits & 1) != 0;
    model.attn_use_rope = model.lightning_use_rope = (bits & 4) == 0;
    model.attn_use_output_gate = (bits & 8) != 0;
    model.qk_norm = (bits & 16) == 0;
    model.use_output_norm = model.use_output_gate = (bits & 32) == 0;
    if ((bits & 16) != 0) model.vocab_size = 5000;  // the logits decide the work space
    PlanInput input = Input(model);
    input.recompute = (bits & 2) != 0;
    input.sparse_attention = (bits & 8) != 0;
    input.threads = 1 + bits % 3;
    for (const std::vector<int32_t>& cu_seqlens : batches) {
      ExpectPeaks(input, cu_seqlens,
                  "bits " + std::to_string(bits) + ", T " + std::to_string(cu_seqlens.back()));
    }
  }
}

TEST(PlanTest, PeaksOfDistillation) {
  for (int bits = 0; bits < 8; ++bits) {
    PlanInput input = Input(SmallModel());
    input.teacher = input.model;
    input.teacher.mixer_types.assign(4, "minicpm4");
    input.phase = PlanPhase::kDistil;
    input.recompute = (bits & 1) != 0;
    input.cross_entropy = (bits & 2) != 0;
    if ((bits & 4) != 0) input.model.vocab_size = input.teacher.vocab_size = 5000;
    ExpectPeaks(input, {0, 100, 640}, "bits " + std::to_string(bits));
  }
}

int64_t Bytes(const RankPlan& plan, const std::string& name) {
  const auto it = plan.comm.find(name);
  return it == plan.comm.end() ? 0 : it->second.bytes;
}

TEST(PlanTest, PeaksOfAnEvaluation) {
  for (const std::vector<int32_t>& cu_seqlens : {std::vector<int32_t>{0, 64}, {0, 300, 700}}) {
    const PlanInput input = Input(SmallModel());
    PassContext at(input, 0);
    at.enter = at.enter_teacher = [](int64_t) {};
    PassEvaluate(at, input.model, cu_seqlens);
    model::ParameterStore params(model::ParameterSpecs(input.model));
    model::InitialiseParameters(input.model, 1, params);
    const model::Model model(input.model, params);
    ThreadPool pool(static_cast<int>(input.threads));
    Arena arena, scratch;
    const Context ctx{.pool = &pool, .scratch = &scratch};
    model::EvaluateCrossEntropy(ctx, arena, model, BatchOf(cu_seqlens, input.model.vocab_size), {});
    EXPECT_EQ(at.arena.peak(), static_cast<int64_t>(arena.peak_bytes()));
    EXPECT_EQ(at.scratch.peak(), static_cast<int64_t>(scratch.peak_bytes()));
  }
}

// As Scorer runs an item.
TEST(PlanTest, PeaksOfAScoredItem) {
  PlanInput input = Input(SmallModel());
  for (std::string& type : input.model.mixer_types)
    type = model::NameOf(model::MixerType::kSoftmax);
  const std::vector<int32_t> cu_seqlens = {0, 700};
  PassContext at(input, 0);
  at.enter = at.enter_teacher = [](int64_t) {};
  PassScore(at, input.model, cu_seqlens);

  model::ModelConfig swapped = input.model;
  swapped.mixer_types[0] = model::NameOf(model::MixerType::kLightning);
  model::ParameterStore params(model::ParameterSpecs(swapped));
  model::InitialiseParameters(swapped, 1, params);
  const model::Model model(swapped, params);
  ThreadPool pool(static_cast<int>(input.threads));
  Arena arena, scratch;
  const Context ctx{.pool = &pool, .scratch = &scratch};
  const model::Batch batch = BatchOf(cu_seqlens, swapped.vocab_size);
  const auto rows = [&] { return arena.New(DType::kF32, {700, swapped.hidden_size}); };
  const Tensor stream = rows();
  std::fill_n(stream.Data<float>(), stream.numel(), 0.5F);
  const Tensor hidden = model.ForwardOnly(ctx, arena, batch, {}, 0, stream);
  model::HeadCrossEntropy(ctx, arena, model, batch, hidden);
  const Tensor kept = rows();
  std::fill_n(kept.Data<float>(), kept.numel(), 0.5F);
  model::HeadKl(ctx, arena, model, kept, model, hidden, batch);
  EXPECT_EQ(at.arena.peak(), static_cast<int64_t>(arena.peak_bytes()));
  EXPECT_EQ(at.scratch.peak(), static_cast<int64_t>(scratch.peak_bytes()));
}

RankPlan PlanOf(const PlanInput& input, int64_t rank = 0) {
  return PlanRank(input, rank, FullMicroBatches(input, rank));
}

TEST(PlanTest, ExchangesOfParametersByHand) {
  // 16-element gaps and pieces that 4 ranks share evenly: every number is exact.
  const int64_t n = model::UnitBorders(model::ParameterSpecs(Input(SmallModel()).model)).back();
  for (int64_t zero = 0; zero <= 2; ++zero) {
    const PlanInput input = Input(SmallModel(), {.dp = 2, .zero_stage = zero});
    int64_t gathered = 0, reduced = 0;
    for (int64_t rank = 0; rank < 2; ++rank) {
      gathered += Bytes(PlanOf(input, rank), "param.all_gather");
      reduced += Bytes(PlanOf(input, rank), "param.reduce_scatter");
    }
    EXPECT_EQ(gathered, n * 4);                               // what one rank has, the other gets
    EXPECT_EQ(reduced, n * 4 * (zero == 2 ? 2 : 1)) << zero;  // of two micro-batches each
  }
}

TEST(PlanTest, TensorParallelTrafficByHand) {
  PlanInput input = Input(SmallModel(), {.dp = 1, .tp = 2, .zero_stage = 0});
  input.recompute = false;
  const int64_t micro_batches = 4;
  const int64_t half = 128 / 2 * 32 * 4;  // the other rank's part of T x H
  // Forward 2 and backward 2 for each layer, the loss and the embedding.
  const int64_t gathers = 4 * 4 + 2;
  // Output norm: T numbers for both passes of each linear layer. Loss: 5 numbers a token.
  const int64_t small = 2 * 2 * 128 * 4 + 128 * 5 * 4;
  const RankPlan plan = PlanOf(input);
  int64_t copies = 0;
  for (const model::ParameterSpec& spec : model::ParameterSpecs(input.model, {0, 2}))
    copies += spec.copies > 1 ? spec.numel * 4 / 2 : 0;
  // Norm weights of one unit are summed together, with the gaps between them.
  const int64_t gaps =
      Bytes(plan, "tp.all_gather") - micro_batches * (gathers * half + small) - copies;
  EXPECT_GE(gaps, 0);
  EXPECT_LE(gaps, 4 * 4 * 16 * 4);
  EXPECT_EQ(Bytes(plan, "tp.reduce_scatter"), micro_batches * (4 * 4 + 2) * half + copies + gaps);
}

TEST(PlanTest, ContextParallelTrafficByHand) {
  PlanInput input = Input(SmallModel(), {.dp = 1, .cp = 2, .zero_stage = 0});
  input.recompute = false;
  const RankPlan plan = PlanOf(input, 1);
  const int64_t half = 128 / 2 * 16 * 4;  // T / 2 rows of keys or values
  EXPECT_EQ(plan.comm.at("cp.all_gather"), (CommCount{4 * 2 * 2, 4 * 2 * 2 * half}));
  EXPECT_EQ(plan.comm.at("cp.reduce_scatter"), (CommCount{4 * 2 * 2, 4 * 2 * 2 * half}));
  // The last range gets a state in the forward pass, none in the backward pass.
  EXPECT_EQ(plan.comm.at("cp.send_receive"), (CommCount{4 * 2 * 2, 4 * 2 * 4 * 8 * 8 * 4}));
}

TEST(PlanTest, RecomputingALayerFetchesNothingTwice) {
  std::vector<int64_t> fetched(7, 0);
  model::SlotSchedule slots({16, 16, 16, 16, 16, 16, 16});  // 4 layers
  const auto enter = [&](int64_t u) {
    slots.Enter(u, [&](int64_t v) { ++fetched[static_cast<size_t>(v)]; });
  };
  for (int64_t u = 0; u <= 6; ++u) enter(u);
  enter(5);
  for (int64_t u = 4; u >= 1; --u) {
    enter(u);
    enter(u);
  }
  // Backwards the last two layers are still in their slots; the others come a second time.
  EXPECT_EQ(fetched, (std::vector<int64_t>{1, 2, 2, 1, 1, 1, 1}));
}

TEST(PlanTest, MemoryFollowsZeroStages) {
  const auto memory = [](int64_t zero) {
    return PlanOf(Input(SmallModel(), {.dp = 4, .zero_stage = zero})).memory;
  };
  EXPECT_EQ(memory(1).parameters, memory(0).parameters);
  EXPECT_NEAR(static_cast<double>(memory(1).optimizer) / static_cast<double>(memory(0).optimizer),
              0.25, 0.05);
  EXPECT_LT(memory(2).gradients, memory(1).gradients);
  EXPECT_LT(memory(3).parameters, memory(2).parameters);
  EXPECT_GT(memory(3).slots, 0);
  EXPECT_EQ(memory(2).slots, 0);
}

// The stage's own numbers of what is kept while layers are scored: two rows of each token.
TEST(PlanTest, MomentsBesideTheStepsAreResidentToo) {
  PlanInput input = Input(SmallModel());
  input.phase = PlanPhase::kDistil;
  input.teacher = input.model;
  EXPECT_EQ(PlanOf(input).memory.scoring, 0);
  EXPECT_EQ(PlanOf(input).memory.fitting, 0);
  input.scoring = {.align = input.batch, .text_tokens = 1 << 20, .prompts = 4, .prompt_tokens = 32};
  input.fit_tokens = 4096;
  const MemoryPlan one = PlanOf(input).memory;
  EXPECT_GT(one.scoring, int64_t{2 << 20} * input.model.hidden_size * 4);
  EXPECT_EQ(one.resident(), one.scoring);
  EXPECT_GT(one.fitting, int64_t{4096} * input.model.hidden_size * 4);
  input.scoring.text_tokens *= 2;
  EXPECT_EQ(PlanOf(input).memory.scoring - one.scoring,
            int64_t{1 << 20} * (2 * input.model.hidden_size * 4 + 2 * 12));
  input.mesh.dp = 2;
  EXPECT_LT(PlanOf(input).memory.scoring, one.scoring * 1.1);
}

TEST(PlanTest, HugePagesRoundTheArenasUp) {
  PlanInput input = Input(SmallModel());
  const int64_t small = PlanOf(input).memory.arena_ends;
  input.huge_pages = true;
  const MemoryPlan huge = PlanOf(input).memory;
  EXPECT_GT(huge.arena_ends, small);
  EXPECT_EQ((huge.activations + huge.work_space + huge.arena_ends) % (2 << 20), 0);
}

// It is for a log line: no abort, and nothing to work out on a GPU.
TEST(PlanTest, ResidentPlanOfAPhaseThatIsNotThere) {
  const model::ModelConfig model = Input(SmallModel()).model;
  StageConfig stage;
  stage.name = "only";
  stage.batch = Input(SmallModel()).batch;
  RunConfig run;
  EXPECT_EQ(ErrorCodeOf(PlanResident({}, stage, run, 1, 0, "align", model).status()), "INTERNAL");
  EXPECT_GT(PlanResident({}, stage, run, 1, 0, "train", model)->total(), 0);
  stage.parallel.tp = 3;  // which does not divide the heads
  EXPECT_EQ(ErrorCodeOf(PlanResident({}, stage, run, 3, 0, "train", model).status()), "CFG-MESH");
  run.device = DeviceKind::kCuda;
  EXPECT_EQ(PlanResident({}, stage, run, 3, 0, "train", model)->total(), 0);
}

TEST(PlanTest, RefusesWhatARunRefuses) {
  PlanInput input = Input(SmallModel(), {.dp = 1, .tp = 3});
  EXPECT_EQ(ErrorCodeOf(CheckPlan(input)), "CFG-MESH");
  input = Input(SmallModel(), {.dp = 1, .cp = 2});
  input.batch.rank_independent_sums = true;
  EXPECT_EQ(ErrorCodeOf(CheckPlan(input)), "CFG-MESH");
  input = Input(SmallModel());
  input.device = DeviceKind::kCuda;
  EXPECT_EQ(ErrorCodeOf(CheckPlan(input)), "CFG-MODEL");  // head_dim 8
  EXPECT_TRUE(CheckPlan(Input(SmallModel(), {.dp = 1, .tp = 2})).ok());
}

TEST(PlanTest, WorkOfAStepIsThatOfItsSamples) {
  PlanInput input = Input(SmallModel());
  const double one = StepFlop(input);
  input.batch.global_batch_tokens *= 3;
  EXPECT_DOUBLE_EQ(StepFlop(input), 3 * one);
  // At least 6 operations for each weight of a product and token.
  EXPECT_GT(StepFlop(input), 6.0 * 64 * 24 * 32 * 48 * 3 * 4);
}

}  // namespace
}  // namespace sala::recipes
