#include "model/projection.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "core/rng.h"
#include "kernels/gemm/gemm.h"
#include "model/model.h"
#include "tests/core/context_test_base.h"

namespace sala::model {
namespace {

using ProjectionTest = sala::testing::ContextTest;

ModelConfig Config() {
  ModelConfig c;
  c.vocab_size = 16;
  c.hidden_size = 16;
  c.intermediate_size = 24;
  c.num_hidden_layers = 2;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.attn_use_output_gate = true;
  c.mixer_types = {"minicpm4", "lightning-attn"};
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

std::vector<Tensor> Inputs(const MixerTensors& m) { return {m.q_proj, m.k_proj, m.v_proj, m.gate}; }

std::vector<float> Random(int64_t n, const std::string& name) {
  PhiloxStream rng("v1|3|projection_test||0|" + name + "|");
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = static_cast<float>(rng.NextNormal());
  return values;
}

TEST_F(ProjectionTest, TheStoreLaysMapsOfOneInputSideBySide) {
  const ModelConfig config = Config();
  ParameterStore store(ParameterSpecs(config));
  const ModelTensors tensors = BindTensors(config, store);
  for (const LayerTensors& layer : tensors.layers) {
    EXPECT_TRUE(Projection(Inputs(layer.mixer)).joined());
    EXPECT_TRUE(Projection({layer.gate_proj, layer.up_proj}).joined());
    // o_proj does not read the same input and comes behind them.
    EXPECT_FALSE(Projection({layer.mixer.o_proj, layer.mixer.q_proj}).joined());
  }
}

// One product and one per map: forward to the bit, gradients of weights to the bit, the input's
// gradient to rounding: at most 112 products and sums in another order, 2^-24 each.
TEST_F(ProjectionTest, OneProductEqualsOnePerMap) {
  constexpr int64_t kTokens = 5;
  const ModelConfig config = Config();
  ParameterStore store(ParameterSpecs(config));
  InitialiseParameters(config, 1, store);
  for (const LayerTensors& layer : BindTensors(config, store).layers) {
    const std::vector<Tensor> weights = Inputs(layer.mixer);
    // Copies that lie elsewhere.
    std::vector<std::vector<float>> memory;
    std::vector<Tensor> apart;
    for (const Tensor& w : weights) {
      memory.emplace_back(w.Data<float>(), w.Data<float>() + w.numel());
      memory.back().push_back(0);
    }
    for (size_t i = 0; i < weights.size(); ++i)
      apart.emplace_back(memory[i].data(), std::initializer_list<int64_t>{weights[i].dim(0), 16});
    const Projection one(weights);
    const Projection many(apart);
    ASSERT_TRUE(one.joined());
    ASSERT_FALSE(many.joined());
    const int64_t width = one.width();
    ASSERT_EQ(width, many.width());

    std::vector<float> x = Random(kTokens * 16, "x");
    std::vector<float> dy = Random(kTokens * width, "dy");
    const ConstTensor input(x.data(), {kTokens, 16});
    const ConstTensor gradient(dy.data(), {kTokens, width});
    std::vector<float> y[2], dx[2];
    ParameterStore gradients[2] = {ParameterStore(store.specs()), ParameterStore(store.specs())};
    for (int i = 0; i < 2; ++i) {
      y[i].assign(static_cast<size_t>(kTokens * width), NAN);
      dx[i].assign(static_cast<size_t>(kTokens * 16), NAN);
      const Projection& p = i == 0 ? one : many;
      p.Forward(ctx_, input, Tensor(y[i].data(), {kTokens, width}));
      const size_t l = layer.mixer.o_norm.empty() ? 0 : 1;
      std::vector<Tensor> to = Inputs(BindTensors(config, gradients[i]).layers[l].mixer);
      // A frozen map: its gradient is left out, and the row of gradients is broken.
      if (i == 1) to[1] = {};
      p.Backward(ctx_, gradient, input, Tensor(dx[i].data(), {kTokens, 16}), to);
      for (size_t m = 0; m < to.size(); ++m) {
        if (m == 1) continue;
        const Tensor piece = p.Piece(Tensor(dy.data(), {kTokens, width}), m);
        std::vector<float> expected(static_cast<size_t>(to[m].numel()), 0.0F);
        kernels::GemmTN(ctx_, piece, input, Tensor(expected.data(), {to[m].dim(0), 16}));
        EXPECT_EQ(std::memcmp(expected.data(), to[m].raw(), expected.size() * sizeof(float)), 0);
      }
    }
    EXPECT_EQ(y[0], y[1]);
    for (size_t i = 0; i < dx[0].size(); ++i)
      EXPECT_NEAR(dx[0][i], dx[1][i], 112 * 0x1p-24 * 16) << i;  // terms are below 16 in all
  }
}

}  // namespace
}  // namespace sala::model
