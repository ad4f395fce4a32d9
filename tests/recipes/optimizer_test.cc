// One update on one rank, by hand: which tensors move, how far, and what is kept of the gradient.
#include "recipes/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "recipes/gradient_reducer.h"

namespace sala::recipes {
namespace {

using model::ParameterKind;
using model::ParameterSpec;

constexpr double kRate = 0.01;
// Of a float32 number near 1 that was added to or subtracted from.
constexpr double kRounding = 0x1p-23;

model::ModelConfig SmallModel() {
  model::ModelConfig c;
  c.vocab_size = 37;
  c.hidden_size = 24;
  c.dim_model_base = 8;  // m = 3
  c.intermediate_size = 32;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 6;
  c.tie_word_embeddings = false;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

class OptimizerTest : public ::testing::Test {
 protected:
  OptimizerTest() : params_(model::ParameterSpecs(config_)) {
    auto mesh = parallel::Mesh::Create(*world_, parallel::MeshConfig());
    EXPECT_TRUE(mesh.ok()) << mesh.status();
    mesh_ = std::move(mesh).value();
    ctx_.pool = &pool_;
    ctx_.scratch = &scratch_;
    compute_ = std::make_unique<model::ComputeParameters>(ctx_, params_);
    reducer_ = std::make_unique<GradientReducer>(ctx_, params_, *mesh_, /*rank_independent=*/false);
    settings_.clip_norm = 0;
    settings_.weight_decay = 0;
    for (int64_t i = 0; i < params_.size(); ++i) params()[i] = Start(i);
  }

  static float Start(int64_t i) { return 1.0F + static_cast<float>(i % 7) / 8; }
  float* params() { return params_.Flat(0, params_.size()).Data<float>(); }

  Optimizer NewOptimizer() {
    return {ctx_, settings_, config_, *compute_, trainable_, *mesh_, *reducer_};
  }
  // An update with gradient(i) for element i.
  template <typename Gradient>
  UpdateResult Update(Optimizer& optimizer, const Gradient& gradient, bool loss_finite = true) {
    reducer_->BeginStep();
    auto* grad = reducer_->store().Flat(0, params_.size()).Data<float>();
    // Nothing in the room between tensors, which the norm counts too.
    ForElements([&](const ParameterSpec&, int64_t i) { grad[i] += gradient(i); });
    const auto result = optimizer.Update(ctx_, kRate, loss_finite);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.value_or(UpdateResult());
  }
  // How far element i moved, without its sign.
  double Moved(int64_t i) {
    return static_cast<double>(Start(i)) - static_cast<double>(params()[i]);
  }

  template <typename Body>
  void ForElements(const Body& body) {
    for (const ParameterSpec& spec : params_.specs()) {
      for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i) body(spec, i);
    }
  }

  model::ModelConfig config_ = SmallModel();
  model::ParameterStore params_;
  ThreadPool pool_{1};
  Arena scratch_;
  Context ctx_;
  std::unique_ptr<parallel::Communicator> world_ = parallel::MakeSelfCommunicator();
  std::unique_ptr<parallel::Mesh> mesh_;
  std::unique_ptr<model::ComputeParameters> compute_;
  std::unique_ptr<GradientReducer> reducer_;
  OptimizerConfig settings_;
  std::function<bool(const ParameterSpec&)> trainable_ = [](const ParameterSpec&) { return true; };
};

float One(int64_t) { return 1.0F; }
float Zero(int64_t) { return 0.0F; }
// Another value for every element of a tensor.
float Ramp(int64_t i) { return 0.001F * static_cast<float>(i % 1009 + 1); }

// With a constant gradient the first update of AdamW moves by the rate.
TEST_F(OptimizerTest, RatesFollowTheKindOfTensor) {
  settings_.embedding_lr_multiplier = 2;
  settings_.vector_lr_multiplier = 3;
  settings_.head_lr_multiplier = 5;
  Optimizer optimizer = NewOptimizer();
  Update(optimizer, One);
  const std::map<ParameterKind, double> multiplier = {{ParameterKind::kMatrix, 1.0 / 3},
                                                      {ParameterKind::kEmbedding, 2},
                                                      {ParameterKind::kVector, 3},
                                                      {ParameterKind::kHead, 5}};
  ForElements([&](const ParameterSpec& spec, int64_t i) {
    ASSERT_NEAR(Moved(i), kRate * multiplier.at(spec.kind), 2 * kRounding) << spec.name;
  });
}

TEST_F(OptimizerTest, DecaysMatricesAndTheHeadOnly) {
  settings_.weight_decay = 0.1;
  settings_.matrix_lr_multiplier = 1;
  Optimizer optimizer = NewOptimizer();
  Update(optimizer, Zero);
  ForElements([&](const ParameterSpec& spec, int64_t i) {
    const bool decayed = spec.kind == ParameterKind::kMatrix || spec.kind == ParameterKind::kHead;
    const double expected = decayed ? kRate * 0.1 * static_cast<double>(Start(i)) : 0.0;
    ASSERT_NEAR(Moved(i), expected, decayed ? 2 * kRounding : 0) << spec.name;
  });
}

TEST_F(OptimizerTest, FrozenTensorsKeepTheirBits) {
  trainable_ = [](const ParameterSpec& spec) {
    return spec.name.find("layers.1.") != std::string::npos;
  };
  Optimizer optimizer = NewOptimizer();
  Update(optimizer, One);
  ForElements([&](const ParameterSpec& spec, int64_t i) {
    ASSERT_EQ(Moved(i) != 0, trainable_(spec)) << spec.name;
  });
}

// What is kept of the first gradient: (1 - beta1) g and (1 - beta2) g^2, each under its own name.
TEST_F(OptimizerTest, SavesWhatItGoesOnWith) {
  Optimizer optimizer = NewOptimizer();
  Update(optimizer, Ramp);
  std::vector<TensorSlice> slices;
  optimizer.AppendSlices(&slices);
  ASSERT_EQ(slices.size(), 3 * params_.specs().size());
  for (const TensorSlice& slice : slices) {
    const ParameterSpec& spec = params_.Spec(slice.name);
    ASSERT_EQ(slice.flat_begin, 0);
    ASSERT_EQ(slice.flat_end, spec.numel);
    const auto* values = static_cast<const float*>(slice.data);
    for (int64_t i = 0; i < spec.numel; ++i) {
      const double g = Ramp(spec.offset + i);
      double expected = params()[spec.offset + i];
      if (slice.kind == TensorKind::kExpAvg) expected = 0.1 * g;
      if (slice.kind == TensorKind::kExpAvgSq) expected = 0.05 * g * g;
      // The factor, the square and the product are rounded.
      ASSERT_NEAR(values[i], expected, 3 * kRounding * expected) << slice.name << " at " << i;
    }
  }
}

TEST_F(OptimizerTest, ClipsToTheNorm) {
  settings_.clip_norm = 0.5;
  Optimizer optimizer = NewOptimizer();
  const UpdateResult result = Update(optimizer, Ramp);
  double squares = 0;
  ForElements([&](const ParameterSpec&, int64_t i) {
    squares += static_cast<double>(Ramp(i)) * static_cast<double>(Ramp(i));
  });
  EXPECT_TRUE(result.clipped);
  EXPECT_NEAR(result.grad_norm, std::sqrt(squares), 1e-12 * std::sqrt(squares));  // float64 sums
  std::vector<TensorSlice> slices;
  optimizer.AppendSlices(&slices);
  double kept = 0;
  for (const TensorSlice& slice : slices) {
    if (slice.kind != TensorKind::kExpAvg) continue;
    for (int64_t i = 0; i < slice.flat_end; ++i) {
      const double value = static_cast<const float*>(slice.data)[i];
      kept += value * value;
    }
  }
  // Every element has three roundings.
  EXPECT_NEAR(std::sqrt(kept), 0.1 * 0.5, 3 * kRounding * 0.05);
}

TEST_F(OptimizerTest, AGradientWithinTheNormIsLeftAlone) {
  settings_.clip_norm = 1e9;
  Optimizer optimizer = NewOptimizer();
  EXPECT_FALSE(Update(optimizer, Ramp).clipped);
}

TEST_F(OptimizerTest, SkipsWhatIsNotFinite) {
  Optimizer optimizer = NewOptimizer();
  EXPECT_TRUE(Update(optimizer, One, /*loss_finite=*/false).skipped);
  EXPECT_TRUE(Update(optimizer, [](int64_t i) {
                return i == 5 ? std::numeric_limits<float>::infinity() : 1.0F;
              }).skipped);
  EXPECT_EQ(optimizer.updates(), 0);
  for (int64_t i = 0; i < params_.size(); ++i) ASSERT_EQ(Moved(i), 0);
  EXPECT_FALSE(Update(optimizer, One).skipped);
  EXPECT_EQ(optimizer.updates(), 1);
}

TEST_F(OptimizerTest, EveryStepStartsWithoutGradients) {
  Optimizer optimizer = NewOptimizer();
  const double first = Update(optimizer, One).grad_norm;
  EXPECT_EQ(Update(optimizer, One).grad_norm, first);
}

}  // namespace
}  // namespace sala::recipes
