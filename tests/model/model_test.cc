#include "model/model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstring>
#include <numeric>

#include "core/rng.h"
#include "model/generate.h"
#include "model/loss.h"
#include "model/reference_model.h"
#include "tests/core/context_test_base.h"
#include "tests/model/cases.h"

namespace sala::model {
namespace {

using ModelTest = sala::testing::ContextTest;
using testing::HybridConfig;
using testing::kRelative;
using testing::RandomBatch;
using testing::RandomParameters;
using testing::TeacherConfig;

// The gradient of every tensor, along one random direction, against the complex step of the
// reference.
void CheckGradients(const Context& ctx, Arena& arena, const ModelConfig& config,
                    const RunOptions& options, const std::vector<int32_t>& lengths) {
  ParameterStore store = RandomParameters(config);
  const Batch batch = RandomBatch(config, lengths, "gradients");
  ParameterStore gradients(store.specs());
  const auto result = CrossEntropyStep(ctx, arena, Model(config, store), batch, options, 1.0F,
                                       BindTensors(config, gradients));
  std::vector<double> values(store.data(), store.data() + store.size());
  const ReferenceModel<double> reference(config, store.specs(), values);
  const double expected = reference.LossSum(batch, options);
  EXPECT_NEAR(result.loss_sum, expected, kRelative * std::abs(expected));
  EXPECT_EQ(result.targets, batch.targets());

  for (const ParameterSpec& spec : store.specs()) {
    PhiloxStream rng("v1|7|model_test||0|direction|" + spec.name);
    std::vector<std::complex<double>> point(values.begin(), values.end());
    constexpr double kStep = 1e-30;
    double along = 0;
    double grad_square = 0;
    double direction_square = 0;
    for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i) {
      const double direction = rng.NextNormal();
      point[static_cast<size_t>(i)] += std::complex<double>(0, kStep * direction);
      along += direction * gradients.data()[i];
      grad_square += static_cast<double>(gradients.data()[i]) * gradients.data()[i];
      direction_square += direction * direction;
    }
    const ReferenceModel<std::complex<double>> moved(config, store.specs(), point);
    const double derivative = moved.LossSum(batch, options).imag() / kStep;
    const double scale =
        std::sqrt(grad_square * direction_square / static_cast<double>(spec.numel));
    EXPECT_GT(grad_square, 0) << spec.name << ": no gradient reached this tensor";
    // `along` sums numel products: its own spread is about |g| |d| / sqrt(numel) times sqrt(numel).
    EXPECT_NEAR(along, derivative,
                kRelative * std::max(std::abs(derivative),
                                     scale * std::sqrt(static_cast<double>(spec.numel))))
        << spec.name;
  }
}

TEST_F(ModelTest, HybridGradientsMatchComplexStep) {
  CheckGradients(ctx_, arena_, HybridConfig(), {}, {17, 1, 9, 30});
}

TEST_F(ModelTest, SparseHybridGradientsMatchComplexStep) {
  // 67 tokens are 9 blocks; a token sees 4, so one free block is really chosen. 23 tokens stay
  // below dense_len.
  CheckGradients(ctx_, arena_, HybridConfig(), {.sparse_attention = true}, {67, 23, 24});
}

TEST_F(ModelTest, TeacherGradientsMatchComplexStep) {
  CheckGradients(ctx_, arena_, TeacherConfig(), {}, {17, 1, 9});
}

TEST_F(ModelTest, KeepingActivationsGivesTheBitsOfRecomputing) {
  const ModelConfig config = HybridConfig();
  ParameterStore store = RandomParameters(config);
  const Batch batch = RandomBatch(config, {40, 25, 3}, "recompute");
  std::vector<ParameterStore> gradients;
  for (const bool recompute : {true, false}) {
    gradients.emplace_back(store.specs());
    CrossEntropyStep(ctx_, arena_, Model(config, store), batch,
                     {.sparse_attention = true, .recompute = recompute}, 0.5F,
                     BindTensors(config, gradients.back()));
  }
  EXPECT_EQ(std::memcmp(gradients[0].data(), gradients[1].data(),
                        static_cast<size_t>(store.size()) * sizeof(float)),
            0);
  EXPECT_EQ(arena_.used_bytes(), 0U);
}

TEST_F(ModelTest, FrozenTensorsGetNoGradientAndChangeNoOther) {
  const ModelConfig config = HybridConfig();
  ParameterStore store = RandomParameters(config);
  const Batch batch = RandomBatch(config, {20, 11}, "frozen");
  ParameterStore all(store.specs());
  ParameterStore some(store.specs());
  const auto wanted = [](const ParameterSpec& spec) {
    return spec.name.find("layers.1.self_attn") != std::string::npos;
  };
  CrossEntropyStep(ctx_, arena_, Model(config, store), batch, {}, 1.0F, BindTensors(config, all));
  CrossEntropyStep(ctx_, arena_, Model(config, store), batch, {}, 1.0F,
                   BindTensors(config, some, wanted));
  for (const ParameterSpec& spec : store.specs()) {
    const size_t bytes = static_cast<size_t>(spec.numel) * sizeof(float);
    const std::vector<float> zero(static_cast<size_t>(spec.numel), 0.0F);
    const float* expected = wanted(spec) ? all.data() + spec.offset : zero.data();
    EXPECT_EQ(std::memcmp(some.data() + spec.offset, expected, bytes), 0) << spec.name;
  }
}

// Changing one token of one document changes no bit of another document's hidden states, nor of the
// loss gradient that reaches another document's embedding rows.
class IsolationTest : public ModelTest,
                      public ::testing::WithParamInterface<std::vector<std::string>> {};

INSTANTIATE_TEST_SUITE_P(
    Mixers, IsolationTest,
    ::testing::Values(std::vector<std::string>{"minicpm4", "minicpm4", "minicpm4", "minicpm4"},
                      std::vector<std::string>{"lightning-attn", "lightning-attn", "lightning-attn",
                                               "lightning-attn"},
                      std::vector<std::string>{"minicpm4", "lightning-attn", "lightning-attn",
                                               "minicpm4"}));

TEST_P(IsolationTest, DocumentsDoNotTouchEachOther) {
  ModelConfig config = HybridConfig();
  // Rows of the embedding tell documents apart: each document uses its own range of ids.
  config.vocab_size = 200;
  config.mixer_types = GetParam();
  ParameterStore store = RandomParameters(config);
  // 9 or 10 blocks a document, of which a token sees 4: compression, scores and selection really
  // run.
  Batch batch = RandomBatch(config, {75, 77, 73}, "leak");
  for (size_t t = 0; t < batch.tokens.size(); ++t) {
    const int32_t document = t < 75 ? 0 : t < 152 ? 1 : 2;
    batch.tokens[t] = document * 60 + batch.tokens[t] % 60;
  }
  Batch changed = batch;
  changed.tokens[100] = changed.tokens[100] == 60 ? 61 : 60;
  for (const bool sparse : {false, true}) {
    const RunOptions options{.sparse_attention = sparse};
    std::vector<std::vector<float>> hidden;
    std::vector<ParameterStore> gradients;
    for (const Batch* b : {&batch, &changed}) {
      const ArenaScope scope(arena_);
      const Tensor h = Model(config, store).ForwardOnly(ctx_, arena_, *b, options);
      hidden.emplace_back(h.Data<float>(), h.Data<float>() + h.numel());
      gradients.emplace_back(store.specs());
      CrossEntropyStep(ctx_, arena_, Model(config, store), *b, options, 1.0F,
                       BindTensors(config, gradients.back()));
    }
    const auto same = [&](int64_t begin, int64_t end) {
      return std::memcmp(hidden[0].data() + begin * config.hidden_size,
                         hidden[1].data() + begin * config.hidden_size,
                         static_cast<size_t>((end - begin) * config.hidden_size) * sizeof(float)) ==
             0;
    };
    EXPECT_TRUE(same(0, 75));
    EXPECT_TRUE(same(152, 225));
    EXPECT_TRUE(same(75, 100)) << "causality inside the document";
    EXPECT_FALSE(same(100, 152)) << "the change must be visible in its own document";
    const auto row_same = [&](int64_t token) {
      const int64_t at =
          gradients[0].Spec("model.embed_tokens.weight").offset + token * config.hidden_size;
      return std::memcmp(gradients[0].data() + at, gradients[1].data() + at,
                         static_cast<size_t>(config.hidden_size) * sizeof(float)) == 0;
    };
    int64_t changed_rows = 0;
    for (int64_t token = 0; token < 200; ++token) {
      if (token < 60 || token >= 120) {
        EXPECT_TRUE(row_same(token)) << token;
      } else {
        changed_rows += row_same(token) ? 0 : 1;
      }
    }
    EXPECT_GT(changed_rows, 1);
  }
}

TEST_F(ModelTest, GenerationAgreesWithTheFullForward) {
  for (ModelConfig config : {HybridConfig(), TeacherConfig()}) {
    ParameterStore store = RandomParameters(config);
    const Model model(config, store);
    const Batch batch = RandomBatch(config, {70}, "generate");
    for (const bool sparse : {false, true}) {
      const RunOptions options{.sparse_attention = sparse};
      for (const size_t prompt : {size_t{1}, size_t{20}, size_t{45}}) {
        Cache cache;
        std::vector<float> logits = model.Prefill(
            ctx_, arena_,
            {batch.tokens.begin(), batch.tokens.begin() + static_cast<int64_t>(prompt)}, options,
            &cache);
        for (size_t n = prompt; n < batch.tokens.size(); ++n) {
          // The full forward of the first n tokens; its last row predicts token n.
          const ArenaScope scope(arena_);
          const Batch part = SingleDocument(
              {batch.tokens.begin(), batch.tokens.begin() + static_cast<int64_t>(n)});
          const Tensor hidden = model.ForwardOnly(ctx_, arena_, part, options);
          const ReferenceModel<double> reference(
              config, store.specs(),
              std::vector<double>(store.data(), store.data() + store.size()));
          std::vector<double> expected(static_cast<size_t>(config.vocab_size));
          double largest = 0;
          for (int64_t v = 0; v < config.vocab_size; ++v) {
            const float* row = hidden.Row<float>(static_cast<int64_t>(n) - 1);
            const float* head = model.tensors().head.Row<float>(v);
            double sum = 0;
            for (int64_t i = 0; i < config.hidden_size; ++i)
              sum += static_cast<double>(row[i]) * head[i];
            expected[static_cast<size_t>(v)] = sum / config.width_multiplier();
            largest = std::max(largest, std::abs(expected[static_cast<size_t>(v)]));
          }
          for (size_t v = 0; v < expected.size(); ++v) {
            ASSERT_NEAR(logits[v], expected[v], kRelative * largest)
                << "prompt " << prompt << ", token " << n;
          }
          logits = model.Decode(ctx_, arena_, batch.tokens[n], options, &cache);
        }
      }
    }
  }
}

// One layer, whose keys and values do not depend on what earlier tokens saw. At dense_len there are
// five blocks, of which a token sees four.
TEST_F(ModelTest, GenerationTurnsSparseAtTheLengthOfTheForwardPass) {
  ModelConfig config = HybridConfig();
  config.num_hidden_layers = 1;
  config.mixer_types = {"minicpm4"};
  config.sparse.dense_len = 40;
  ASSERT_TRUE(config.Resolve().ok());
  ParameterStore store = RandomParameters(config);
  const Model model(config, store);
  const std::vector<int32_t> tokens = RandomBatch(config, {44}, "turn").tokens;
  const RunOptions options{.sparse_attention = true};
  const auto prefill = [&](int64_t n, Cache* cache) {
    return model.Prefill(ctx_, arena_, {tokens.begin(), tokens.begin() + n}, options, cache);
  };
  Cache cache;
  prefill(36, &cache);
  for (int64_t n = 37; n <= 44; ++n) {
    const std::vector<float> found =
        model.Decode(ctx_, arena_, tokens[static_cast<size_t>(n) - 1], options, &cache);
    Cache unused;
    const std::vector<float> expected = prefill(n, &unused);
    float largest = 0;
    for (const float logit : expected) largest = std::max(largest, std::abs(logit));
    for (size_t v = 0; v < expected.size(); ++v)
      ASSERT_NEAR(found[v], expected[v], kRelative * largest) << n << " tokens";
  }
}

TEST_F(ModelTest, ForwardFromCachedLayerInputGivesTheSameBits) {
  const ModelConfig config = HybridConfig();
  ParameterStore store = RandomParameters(config);
  const Model model(config, store);
  const Batch batch = RandomBatch(config, {20, 11}, "cached");
  const ArenaScope scope(arena_);
  std::vector<float> input;
  const Tensor whole = model.ForwardOnly(
      ctx_, arena_, batch, {}, 0, {}, nullptr, [&](int64_t layer, const ConstTensor& x) {
        if (layer == 2) input.assign(x.Data<float>(), x.Data<float>() + x.numel());
      });
  const Tensor part = model.ForwardOnly(ctx_, arena_, batch, {}, 2,
                                        Tensor(input.data(), {batch.size(), config.hidden_size}));
  EXPECT_EQ(
      std::memcmp(whole.raw(), part.raw(), static_cast<size_t>(whole.numel()) * sizeof(float)), 0);
}

TEST_F(ModelTest, LayerHookSeesTheMixerAlone) {
  const ModelConfig config = HybridConfig();
  ParameterStore store = RandomParameters(config);
  const Model model(config, store);
  const Batch batch = RandomBatch(config, {20}, "hook");
  const ArenaScope scope(arena_);
  int64_t layers = 0;
  std::vector<std::vector<float>> inputs;
  model.ForwardOnly(ctx_, arena_, batch, {}, 0, {},
                    [&](int64_t layer, const ConstTensor& normed, const ConstTensor& mixer_out) {
                      EXPECT_EQ(layer, layers++);
                      EXPECT_EQ(mixer_out.dim(1), config.hidden_size);
                      double square = 0;
                      for (int64_t i = 0; i < mixer_out.numel(); ++i)
                        square += std::pow(mixer_out.Data<float>()[i], 2);
                      EXPECT_GT(square, 0);
                      EXPECT_EQ(normed.dim(0), batch.size());
                    });
  EXPECT_EQ(layers, config.num_hidden_layers);
}

TEST(SampleTokenTest, GreedyTakesTheLowestIdOfTheBest) {
  PhiloxStream rng(1);
  EXPECT_EQ(SampleToken({1.0F, 3.0F, 3.0F, 2.0F}, 0, 1, rng), 1);
}

TEST(SampleTokenTest, TopPKeepsTheSmallestSufficientSet) {
  PhiloxStream rng(2);
  // Probabilities 0.5, 0.3, 0.2: top_p 0.5 keeps the first only, 0.7 the first two.
  const std::vector<float> logits = {std::log(0.5F), std::log(0.3F), std::log(0.2F)};
  std::vector<int> counts(3, 0);
  for (int i = 0; i < 2000; ++i) EXPECT_EQ(SampleToken(logits, 1.0, 0.5, rng), 0);
  for (int i = 0; i < 4000; ++i) ++counts[static_cast<size_t>(SampleToken(logits, 1.0, 0.7, rng))];
  EXPECT_EQ(counts[2], 0);
  // Binomial with p = 0.5 / 0.8: standard deviation sqrt(4000 * 0.625 * 0.375) = 31; 5 of them.
  EXPECT_NEAR(counts[0], 4000 * 0.625, 5 * 31);
}

TEST(SampleTokenTest, TemperatureSharpens) {
  PhiloxStream rng(3);
  int best = 0;
  for (int i = 0; i < 2000; ++i) best += SampleToken({1.0F, 0.0F}, 0.25, 1.0, rng) == 0 ? 1 : 0;
  const double p = 1 / (1 + std::exp(-4.0));
  EXPECT_NEAR(best, 2000 * p, 5 * std::sqrt(2000 * p * (1 - p)));  // 5 standard deviations
}

TEST(ModelConfigTest, PublishedModelHasThePublishedParameters) {
  ModelConfig c;
  c.vocab_size = 73448;
  c.hidden_size = 4096;
  c.intermediate_size = 16384;
  c.num_hidden_layers = 32;
  c.num_attention_heads = 32;
  c.num_key_value_heads = 2;
  c.head_dim = 128;
  c.attn_use_rope = false;
  c.attn_use_output_gate = true;
  c.mixer_types.assign(32, "lightning-attn");
  for (size_t l : {0, 9, 16, 17, 22, 29, 30, 31}) c.mixer_types[l] = "minicpm4";
  c.scale_depth = 1.4;
  ASSERT_TRUE(c.Resolve().ok());
  EXPECT_DOUBLE_EQ(c.residual_scale(), 1.4 / std::sqrt(32.0));
  int64_t parameters = 0;
  const auto specs = ParameterSpecs(c);
  for (const ParameterSpec& spec : specs) parameters += spec.numel;
  EXPECT_EQ(specs.size(), 395U);
  EXPECT_EQ(parameters, 9'477'203'968);
  EXPECT_DOUBLE_EQ(c.residual_scale(), 0.2474873734152916);
  EXPECT_DOUBLE_EQ(c.width_multiplier(), 16.0);
}

TEST(ModelConfigTest, RefusesWhatDoesNotFit) {
  const auto message = [](ModelConfig c) { return MessageOf(c.Resolve()); };
  ModelConfig c = HybridConfig();
  c.num_key_value_heads = 3;
  EXPECT_NE(message(c).find("CFG-MODEL: model.num_attention_heads 4 is not a multiple"),
            std::string::npos)
      << message(c);
  c = HybridConfig();
  c.mixer_types.pop_back();
  EXPECT_NE(message(c).find("mixer_types has 3 entries for 4 layers"), std::string::npos)
      << message(c);
  c = HybridConfig();
  c.mixer_types[1] = "mamba";
  EXPECT_NE(message(c).find("'mamba'; use minicpm4 or lightning-attn"), std::string::npos)
      << message(c);
  c = HybridConfig();
  c.sparse.kernel_size = 5;
  EXPECT_NE(message(c).find("model.sparse_config: "), std::string::npos) << message(c);
  c = HybridConfig();
  c.vocab_size = 0;
  EXPECT_NE(message(c).find("vocab_size is not known"), std::string::npos) << message(c);
}

}  // namespace
}  // namespace sala::model
