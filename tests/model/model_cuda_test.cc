// The whole model on the GPU path against the CPU: the same parameters, rounded to bfloat16 first
// so that both compute with the same numbers.
#include <cmath>
#include <cstring>

#include "core/rng.h"
#include "model/loss.h"
#include "model/model.h"
#include "tests/kernels/common/cuda_test.h"
#include "tests/model/cases.h"

namespace sala::model {
namespace {

class ModelCuda : public kernels::CudaKernelTest {
 protected:
  ModelCuda() : device_arena_(size_t{1} << 20, &kernels::TestDevice()) {}
  Context cpu() { return {DeviceKind::kCpu, &pool_, &scratch_}; }
  Arena& host_arena() { return host_arena_; }
  Arena& device_arena() { return device_arena_; }

 private:
  ThreadPool pool_{1};
  Arena scratch_, host_arena_, device_arena_;
};

ModelConfig HybridConfig() {
  ModelConfig c;
  c.vocab_size = 89;
  c.hidden_size = 64;
  c.intermediate_size = 96;
  c.num_hidden_layers = 4;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 16;
  c.mixer_types = {"minicpm4", "lightning-attn", "lightning-attn", "minicpm4"};
  c.attn_use_rope = false;
  c.attn_use_output_gate = true;
  c.scale_emb = 12;
  c.dim_model_base = 16;
  // A document of 96 tokens has 6 blocks and a token sees all of them: what is selected does not
  // hang on rounding, so the two forms compute the same function.
  static_cast<kernels::SparseAttentionConfig&>(c.sparse) = {.kernel_size = 8,
                                                            .kernel_stride = 4,
                                                            .block_size = 16,
                                                            .init_blocks = 1,
                                                            .window_size = 32,
                                                            .topk = 4,
                                                            .dense_len = 64};
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

// Random weights that bfloat16 holds exactly.
ParameterStore RandomParameters(const ModelConfig& config) {
  ParameterStore store(ParameterSpecs(config));
  InitialiseParameters(config, 11, store);
  PhiloxStream rng("v1|7|model_cuda_test||0|gains|");
  for (const ParameterSpec& spec : store.specs()) {
    float* data = store.data() + spec.offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (spec.kind == ParameterKind::kVector)
        data[i] += static_cast<float>(0.2 * rng.NextNormal());
      data[i] = static_cast<float>(BF16(data[i]));
    }
  }
  return store;
}

double Norm(const std::vector<float>& x) {
  double sum = 0;
  for (float v : x) sum += static_cast<double>(v) * v;
  return std::sqrt(sum);
}

// A tensor that is rounded to bfloat16 gets a relative error of 2^-9 (root mean square of a uniform
// error of at most 2^-8 half steps is 2^-8 / sqrt 3, about 2^-9). About 20 rounded tensors lie on
// the way through a layer and back, 4 layers; as a random walk sqrt(80) * 2^-9 = 1.7 %. Norms and
// softmax amplify by a factor of a few; a wrong formula changes a gradient by tens of percent.
constexpr double kGradientBound = 3 * 0.017;
// The loss is a mean over all tokens of logits with errors of that size times the logit itself.
constexpr double kLossBound = 0.005;

std::vector<float> Values(ParameterStore& store, const ParameterSpec& spec, Device* device) {
  std::vector<float> values(static_cast<size_t>(spec.numel));
  const Tensor range = store.Flat(spec.offset, spec.offset + spec.numel);
  if (device != nullptr) {
    device->Download(values.data(), range.raw(), values.size() * sizeof(float));
  } else {
    std::memcpy(values.data(), range.raw(), values.size() * sizeof(float));
  }
  return values;
}

struct Case {
  const char* name;
  bool teacher;
  bool recompute;
  bool sparse;
};

class ModelCudaStep : public ModelCuda, public ::testing::WithParamInterface<Case> {};

TEST_P(ModelCudaStep, LossAndEveryGradientAgreeWithTheCpu) {
  const ModelConfig config =
      GetParam().teacher ? testing::TeacherOf(HybridConfig()) : HybridConfig();
  ParameterStore store = RandomParameters(config);
  const Batch batch = testing::RandomBatch(
      config,
      kernels::kSlowBuild ? std::vector<int32_t>{70, 1, 9} : std::vector<int32_t>{96, 1, 40},
      "cuda");
  const RunOptions options = {.sparse_attention = GetParam().sparse,
                              .recompute = GetParam().recompute};
  const auto scale = static_cast<float>(1.0 / static_cast<double>(batch.targets()));

  ParameterStore expected(store.specs());
  const auto cpu_loss = CrossEntropyStep(cpu(), host_arena(), Model(config, store), batch, options,
                                         scale, BindTensors(config, expected));

  ComputeParameters parameters(ctx(), store);
  ParameterStore found(store.specs(), DType::kF32, ctx().gpu);
  const Model model(config, parameters.store());
  const auto loss = CrossEntropyStep(ctx(), device_arena(), model, batch, options, scale,
                                     BindTensors(config, found));
  EXPECT_EQ(loss.targets, cpu_loss.targets);
  EXPECT_NEAR(loss.loss_sum, cpu_loss.loss_sum, kLossBound * cpu_loss.loss_sum);
  for (const ParameterSpec& spec : store.specs()) {
    const std::vector<float> a = Values(expected, spec, nullptr);
    std::vector<float> difference = Values(found, spec, ctx().gpu);
    for (size_t i = 0; i < a.size(); ++i) difference[i] -= a[i];
    EXPECT_LE(Norm(difference), kGradientBound * Norm(a)) << spec.name;
  }
  EXPECT_EQ(device_arena().used_bytes(), 0U);

  // Again: the same bits.
  ParameterStore again(store.specs(), DType::kF32, ctx().gpu);
  CrossEntropyStep(ctx(), device_arena(), model, batch, options, scale, BindTensors(config, again));
  for (const ParameterSpec& spec : store.specs()) {
    EXPECT_EQ(Values(found, spec, ctx().gpu), Values(again, spec, ctx().gpu)) << spec.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Models, ModelCudaStep,
                         ::testing::Values(Case{"hybrid_dense", false, false, false},
                                           Case{"hybrid_sparse", false, true, true},
                                           Case{"teacher", true, true, false}),
                         [](const auto& test) { return std::string(test.param.name); });

// What is measured on a device without memory is what the real run uses, scratch included.
TEST_F(ModelCuda, DryRunMeasuresTheMemoryOfTheRealOne) {
  const ModelConfig config = HybridConfig();
  ParameterStore store = RandomParameters(config);
  const Batch batch = testing::RandomBatch(config, {96, 1, 40}, "cuda");
  ComputeParameters parameters(ctx(), store);
  ParameterStore gradients(store.specs(), DType::kF32, ctx().gpu);
  const Model model(config, parameters.store());
  const ModelTensors views = BindTensors(config, gradients);

  const auto dry = OpenCudaDevice({.host = "test", .dry = true});
  ASSERT_TRUE(dry.ok()) << MessageOf(dry.status());
  for (const bool recompute : {false, true}) {
    const RunOptions options = {.sparse_attention = true, .recompute = recompute};
    size_t planned[2];
    {
      Arena arena(size_t{1} << 20, dry->get());
      Arena scratch(size_t{1} << 20, dry->get());
      Context plan = ctx();
      plan.gpu = dry->get();
      plan.scratch = &scratch;
      CrossEntropyStep(plan, arena, model, batch, options, 1.0F, views);
      planned[0] = arena.peak_bytes();
      planned[1] = scratch.peak_bytes();
    }
    Arena arena(size_t{1} << 20, ctx().gpu);
    Arena scratch(size_t{1} << 20, ctx().gpu);
    arena.Reserve(planned[0]);
    scratch.Reserve(planned[1]);
    Context real = ctx();
    real.scratch = &scratch;
    CrossEntropyStep(real, arena, model, batch, options, 1.0F, views);
    ctx().gpu->Synchronize();
    EXPECT_EQ(arena.peak_bytes(), planned[0]);
    EXPECT_EQ(scratch.peak_bytes(), planned[1]);
    EXPECT_EQ(arena.reserved_bytes(), planned[0]) << "one block of just this size";
    EXPECT_EQ(scratch.reserved_bytes(), planned[1]);
  }
}

}  // namespace
}  // namespace sala::model
