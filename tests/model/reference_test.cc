// The float64 reference: its hand-written gradients against complex steps of its own forward pass,
// the fast path against it element by element, and its bfloat16 rounding points.
#include "model/reference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/rng.h"
#include "kernels/kl_divergence/reference.h"
#include "model/loss.h"
#include "model/reference_model.h"
#include "tests/core/context_test_base.h"
#include "tests/model/cases.h"
#include "tests/model/reference_check.h"

namespace sala::model {
namespace {

using ReferenceTest = sala::testing::ContextTest;
using testing::Complex;
using testing::ComplexModel;
using testing::ExpectComplexStep;
using testing::ExpectElements;
using testing::ExpectFastPathAgrees;
using testing::HybridConfig;
using testing::kDoubleRelative;
using testing::kRelative;
using testing::kSafeMargin;
using testing::RandomBatch;
using testing::RandomParameters;
using testing::TeacherConfig;

using PublishedModel = ReferenceModel<double, kernels::reference::RoundedToBf16>;

struct NamedConfig {
  std::string name;
  ModelConfig config;
  RunOptions options;
  std::vector<int32_t> lengths;
};

// Every feature of both mixers on and off. A token of the sparse cases sees 4 blocks of 8, so 67
// tokens leave blocks out; 23 stay below dense_len, and one token is the shortest document.
std::vector<NamedConfig> Configs() {
  std::vector<NamedConfig> all;
  const auto add = [&](const std::string& name, ModelConfig config, RunOptions options,
                       const std::vector<int32_t>& lengths) {
    EXPECT_TRUE(config.Resolve().ok()) << name;
    all.push_back({name, std::move(config), options, lengths});
  };
  add("hybrid", HybridConfig(), {}, {17, 1, 9, 30});
  add("sparse hybrid", HybridConfig(), {.sparse_attention = true}, {67, 23, 1, 24});
  add("teacher", TeacherConfig(), {}, {17, 1, 9});
  add("sparse teacher", TeacherConfig(), {.sparse_attention = true}, {67, 1});
  ModelConfig bare = HybridConfig();
  bare.attn_use_output_gate = false;
  bare.qk_norm = false;
  bare.use_output_norm = false;
  bare.use_output_gate = false;
  bare.lightning_use_rope = false;
  add("bare mixers", bare, {}, {17, 1, 9});
  ModelConfig scaled = HybridConfig();
  scaled.use_output_gate = false;
  scaled.attn_qk_norm = true;
  add("logit scale", scaled, {.logit_scale_base = 50}, {17, 1, 9});
  return all;
}

TEST_F(ReferenceTest, CrossEntropyGradientsAreComplexSteps) {
  for (const NamedConfig& c : Configs()) {
    const ParameterStore store = RandomParameters(c.config);
    Batch batch = RandomBatch(c.config, c.lengths, "reference");
    batch.labels[3] = -1;  // besides the ends of documents
    constexpr double kScale = 0.25;
    const ReferenceResult result = ReferenceCrossEntropy(c.config, store, batch, c.options, kScale);
    EXPECT_EQ(result.count, batch.targets());
    EXPECT_EQ(std::isfinite(result.selection_margin), c.options.sparse_attention) << c.name;
    ExpectComplexStep(c.name, store, result.gradients, [&](const std::vector<Complex>& point) {
      return kScale * ComplexModel(c.config, store.specs(), point).LossSum(batch, c.options);
    });
  }
}

// Teacher and hybrid of one size.
DistillationOptions Distillation(float ce_grad_scale) {
  return {.student = {.sparse_attention = true},
          .teacher = {},
          .kl_grad_scale = 0.5F,
          .ce_grad_scale = ce_grad_scale,
          .temperature = 2.0F};
}

TEST_F(ReferenceTest, DistillationGradientsAreComplexSteps) {
  const ModelConfig teacher_config = TeacherConfig();
  const ModelConfig config = HybridConfig();
  const ParameterStore teacher = RandomParameters(teacher_config);
  const ParameterStore store = RandomParameters(config);
  const Batch batch = RandomBatch(config, {40, 1, 9}, "distillation");
  const std::vector<double> target = ReferenceForward(teacher_config, teacher, batch, {}).logits;
  for (const float ce : {0.0F, 0.125F}) {
    const DistillationOptions options = Distillation(ce);
    const auto result =
        ReferenceDistillation(teacher_config, teacher, config, store, batch, options);
    EXPECT_EQ(result.count, batch.size());
    EXPECT_EQ(result.targets, batch.targets());
    EXPECT_NEAR(result.ce_sum, ReferenceForward(config, store, batch, options.student).loss_sum,
                kDoubleRelative * result.ce_sum);
    ExpectComplexStep(
        "distillation", store, result.gradients, [&](const std::vector<Complex>& point) {
          const ComplexModel model(config, store.specs(), point);
          const auto logits = model.Logits(model.Hidden(batch, options.student));
          return 0.5 * kernels::reference::KlDivergenceForward(batch.size(), config.vocab_size, 2.0,
                                                               target.data(), logits.data()) +
                 static_cast<double>(ce) *
                     kernels::reference::CrossEntropyOfLogits(batch.size(), config.vocab_size,
                                                              logits.data(), batch.labels.data());
        });
  }
}

TEST_F(ReferenceTest, AlignmentGradientsAreComplexSteps) {
  ModelConfig teacher_config = TeacherConfig();
  teacher_config.lightning_use_rope = true;
  ModelConfig config = teacher_config;
  config.mixer_types.assign(4, "lightning-attn");
  const ParameterStore teacher = RandomParameters(teacher_config);
  std::vector<ParameterSpec> specs;
  for (int64_t layer = 0; layer < 4; ++layer) {
    for (const ParameterSpec& spec : MixerSpecs(config, layer, MixerType::kLightning))
      specs.push_back(spec);
  }
  LayOut(specs);
  ParameterStore mixers(specs);
  const ParameterStore whole = RandomParameters(config);
  for (const ParameterSpec& spec : mixers.specs()) {
    std::copy_n(whole.data() + whole.Spec(spec.name).offset, spec.numel,
                mixers.data() + spec.offset);
  }
  const Batch batch = RandomBatch(config, {17, 1, 9}, "alignment");
  const ReferenceModel<double> teacher_model(
      teacher_config, teacher.specs(),
      std::vector<double>(teacher.data(), teacher.data() + teacher.size()));
  for (const MixerDistance distance : {MixerDistance::kMeanSquare, MixerDistance::kEuclidean}) {
    constexpr double kScale = 3;
    const ReferenceResult result =
        ReferenceAlignment(teacher_config, teacher, config, mixers, batch, distance, kScale);
    const auto loss = [&](const std::vector<Complex>& point) {
      const ComplexModel model(config, mixers.specs(), point);
      Complex sum = 0;
      teacher_model.Hidden(
          batch, {}, nullptr,
          [&](int64_t layer, const std::vector<double>& normed, const std::vector<double>& target) {
            const auto y =
                model.Mixer(layer, std::vector<Complex>(normed.begin(), normed.end()), batch, {});
            for (int64_t t = 0; t < batch.size(); ++t) {
              Complex mean = 0;
              for (int64_t i = 0; i < config.hidden_size; ++i) {
                const auto at = static_cast<size_t>(t * config.hidden_size + i);
                mean += (y[at] - target[at]) * (y[at] - target[at]) /
                        static_cast<double>(config.hidden_size);
              }
              sum += distance == MixerDistance::kMeanSquare ? mean : std::sqrt(mean);
            }
          });
      return sum / static_cast<double>(4 * batch.size());
    };
    const double expected =
        loss(std::vector<Complex>(mixers.data(), mixers.data() + mixers.size())).real();
    EXPECT_NEAR(result.loss_sum, expected, kDoubleRelative * expected);
    ExpectComplexStep("alignment", mixers, result.gradients,
                      [&](const std::vector<Complex>& point) { return kScale * loss(point); });
  }
}

TEST_F(ReferenceTest, FastPathAgreesElementByElement) {
  for (const NamedConfig& c : Configs()) {
    if (c.options.logit_scale_base > 0) continue;  // for inference: the fast path has no gradient
    const ReferenceResult expected =
        ExpectFastPathAgrees(ctx_, arena_, c.name, c.config, RandomParameters(c.config), c.options,
                             RandomBatch(c.config, c.lengths, "elements"));
    EXPECT_GT(expected.selection_margin, kSafeMargin) << c.name << ": take another seed";
  }
}

TEST_F(ReferenceTest, FastDistillationAgreesElementByElement) {
  const ModelConfig teacher_config = TeacherConfig();
  const ModelConfig config = HybridConfig();
  ParameterStore teacher = RandomParameters(teacher_config);
  ParameterStore store = RandomParameters(config);
  const Batch batch = RandomBatch(config, {67, 1, 9}, "distillation");
  const DistillationOptions options = Distillation(0.125F);
  const auto expected =
      ReferenceDistillation(teacher_config, teacher, config, store, batch, options);
  ASSERT_GT(expected.selection_margin, kSafeMargin);
  ParameterStore gradients(store.specs());
  const DistillationResult result =
      DistillationStep(ctx_, arena_, Model(teacher_config, teacher), Model(config, store), batch,
                       options, BindTensors(config, gradients));
  EXPECT_NEAR(result.kl.loss_sum, expected.loss_sum, kRelative * expected.loss_sum);
  EXPECT_NEAR(result.ce.loss_sum, expected.ce_sum, kRelative * expected.ce_sum);
  for (const ParameterSpec& spec : store.specs()) {
    ExpectElements(spec.name, gradients.data() + spec.offset,
                   expected.gradients.data() + spec.offset, spec.numel);
  }
}

// ---- published rounding ----

constexpr kernels::reference::RoundedToBf16 kRounded;

bool IsBf16(double x) { return kRounded(x) == x; }

void ExpectBf16(const std::string& what, const std::vector<double>& values) {
  EXPECT_TRUE(std::all_of(values.begin(), values.end(), IsBf16)) << what;
}

std::vector<double> RoundedValues(const ParameterStore& store) {
  std::vector<double> values(store.data(), store.data() + store.size());
  for (double& value : values) value = kRounded(value);
  return values;
}

TEST(PublishedRounding, EveryStoredTensorIsBf16) {
  for (const NamedConfig& c : Configs()) {
    if (c.options.logit_scale_base > 0) continue;  // no part of the published code
    const ParameterStore store = RandomParameters(c.config);
    const Batch batch = RandomBatch(c.config, c.lengths, "published");
    const PublishedModel model(c.config, store.specs(), RoundedValues(store));
    ReferenceTrace<double> trace;
    std::vector<std::vector<double>> mixed;
    const std::vector<double> hidden = model.Hidden(
        batch, c.options, &trace, [&](int64_t layer, const auto& normed, const auto& y) {
          const std::string at = c.name + ", layer " + std::to_string(layer);
          ExpectBf16(at + ": input norm", normed);
          ExpectBf16(at + ": mixer output", y);
          mixed.push_back(y);
        });
    ASSERT_EQ(trace.layers.size(), static_cast<size_t>(c.config.num_hidden_layers));
    for (size_t l = 0; l < trace.layers.size(); ++l) {
      const ReferenceLayerTrace<double>& s = trace.layers[l];
      const ReferenceMixerTrace<double>& m = s.mixer;
      for (const auto* x : {&s.x, &s.mid, &s.n2, &s.gate, &s.up, &s.h, &m.x, &m.q_raw, &m.k_raw,
                            &m.v, &m.q, &m.k, &m.o, &m.z, &m.u})
        ExpectBf16(c.name + ", layer " + std::to_string(l), *x);
      for (size_t i = 0; i < s.x.size(); ++i) {
        const double branch = kRounded(c.config.residual_scale() * mixed[l][i]);
        ASSERT_EQ(s.mid[i], kRounded(s.x[i] + branch)) << "the branch is rounded before the sum";
      }
    }
    ExpectBf16(c.name + ": last", trace.last);
    ExpectBf16(c.name + ": hidden", hidden);
    ExpectBf16(c.name + ": logits", model.Logits(hidden));
  }
}

TEST(PublishedRounding, ParametersAreRoundedFirst) {
  const ModelConfig config = HybridConfig();
  const ParameterStore store = RandomParameters(config);
  ParameterStore rounded(store.specs());
  const std::vector<double> values = RoundedValues(store);
  std::copy(values.begin(), values.end(), rounded.data());
  ASSERT_NE(std::memcmp(store.data(), rounded.data(), static_cast<size_t>(store.size()) * 4), 0);
  const Batch batch = RandomBatch(config, {30, 9}, "published");
  const auto logits = [&](const ParameterStore& s) {
    return ReferenceForward(config, s, batch, {}, ReferenceArithmetic::kPublishedRounding).logits;
  };
  EXPECT_EQ(logits(store), logits(rounded));
}

TEST(PublishedRounding, DiffersByRoundingsOfBf16) {
  for (const NamedConfig& c : Configs()) {
    if (c.options.sparse_attention || c.options.logit_scale_base > 0) continue;
    const ParameterStore store = RandomParameters(c.config);
    const Batch batch = RandomBatch(c.config, c.lengths, "published");
    const ReferenceResult exact = ReferenceForward(c.config, store, batch, c.options);
    const ReferenceResult rounded = ReferenceForward(c.config, store, batch, c.options,
                                                     ReferenceArithmetic::kPublishedRounding);
    EXPECT_EQ(exact.count, rounded.count);
    double square = 0;
    double error = 0;
    for (size_t i = 0; i < exact.logits.size(); ++i) {
      square += exact.logits[i] * exact.logits[i];
      error += std::pow(rounded.logits[i] - exact.logits[i], 2);
    }
    // Some 15 roundings a layer of 2^-9 at most, a third of that in the mean, adding up as a random
    // walk over 4 layers: sqrt(15 * 4) * 2^-9 / sqrt(3). Norms, softmax and the linear layers'
    // norms of small outputs have condition numbers of a few: a factor of 8 upwards, and of 4 down,
    // since residual branches are scaled.
    const double walk = std::sqrt(15 * 4 / 3.0) * 0x1p-9;
    EXPECT_LT(std::sqrt(error / square), 8 * walk) << c.name;
    EXPECT_GT(std::sqrt(error / square), walk / 4) << c.name;
  }
}

// By hand; bfloat16 has 8 significant bits. `once` is what one rounding at the end would give.

// x = (1, 3), no epsilon: r = 1 / sqrt(5) and u = (0.44721, 1.34164), stored as (0.447265625,
// 1.34375). 1.34375 * 1.015625 = 1.36475 -> 1.3671875; once: 1.36260 -> 1.359375.
TEST(PublishedRounding, NormIsRoundedBeforeItsWeight) {
  const std::vector<double> x = {1, 3};
  const std::vector<double> weight = {1, 1.015625};
  std::vector<double> y(2);
  kernels::reference::RmsNormForward(1, 2, x.data(), weight.data(), 0.0, y.data(),
                                     static_cast<double*>(nullptr), kRounded);
  EXPECT_EQ(y, (std::vector<double>{0.447265625, 1.3671875}));
}

// silu(2) = 1.76159 -> 1.7578125, times 1.0234375 = 1.79901 -> 1.796875; once: 1.80288 ->
// 1.8046875.
TEST(PublishedRounding, SiluIsRoundedBeforeItsProduct) {
  const double gate = 2;
  const double up = 1.0234375;
  double y = 0;
  kernels::reference::SwiGluForward(1, &gate, &up, &y, kRounded);
  EXPECT_EQ(y, 1.796875);
}

// sigmoid(1) = 0.73106 -> 0.73046875, times 1.0234375 = 0.74759 -> 0.74609375; once: 0.74819 ->
// 0.75.
TEST(PublishedRounding, GateIsRoundedBeforeItsProduct) {
  const double o = 1.0234375;
  const double z = 1;
  double y = 0;
  kernels::reference::OutputGateForward<double>(1, 1, &o, nullptr, &z, 0.0, &y, kRounded);
  EXPECT_EQ(y, 0.74609375);
}

// x = (1, 3) normed as above, stored, then turned by 1 radian: 0.447265625 cos 1 - 1.34375 sin 1 =
// -0.88907 -> -0.890625 and 1.34375 cos 1 + 0.447265625 sin 1 = 1.10239 -> 1.1015625.
TEST(PublishedRounding, RotationActsOnTheRoundedNorm) {
  const std::vector<double> x = {1, 3};
  const std::vector<double> weight = {1, 1};
  const auto tables = kernels::reference::MakeRopeTables(std::vector<int32_t>{1}, 2, 10000.0F);
  std::vector<double> y(2);
  kernels::reference::QkNormRopeForward(1, 1, 2, x.data(), weight.data(), 0.0, tables.cos.data(),
                                        tables.sin.data(), y.data(), kRounded);
  EXPECT_EQ(y, (std::vector<double>{-0.890625, 1.1015625}));
}

// A fine window of the keys 1 and 1.0078125 has the mean 1.00390625, half way between two
// neighbours: to the even one, 1. The one coarse window, of all 8 keys, has the mean 1.001953125 ->
// 1.
TEST(PublishedRounding, CompressedKeysAndBlockScoresAreRounded) {
  kernels::SparseAttentionConfig config;
  config.kernel_size = 2;
  config.kernel_stride = 1;
  config.block_size = 2;
  config.window_size = 2;
  config.topk = 3;
  const kernels::reference::AttentionShape shape{.n = 8, .query_heads = 1, .kv_heads = 1, .d = 1};
  const std::vector<double> k = {1, 1.0078125, 1, 1.0078125, 1, 1, 1, 1};
  const std::vector<double> q(8, 1.5);
  const auto keys = kernels::reference::CompressKeys(shape, k, config, kRounded);
  ASSERT_EQ(keys.fine.size(), 7U);
  ASSERT_EQ(keys.coarse.size(), 1U);
  EXPECT_EQ(keys.fine[0][0], 1.0);
  EXPECT_EQ(keys.coarse[0][0], 1.0);
  const auto exact = kernels::reference::CompressKeys(shape, k, config);
  EXPECT_EQ(exact.fine[0][0], 1.00390625);
  // e^(1.5 (1.00390625 - 1.001953125)) = 1.00293 -> 1 as stored; the coarse key ends at token 7.
  EXPECT_EQ(kernels::reference::Relevance(shape, q, exact, config, 7, 0, kRounded)[0], 1.0);
  EXPECT_NEAR(kernels::reference::Relevance(shape, q, exact, config, 7, 0)[0], 1.0029340, 1e-7);
}

}  // namespace
}  // namespace sala::model
