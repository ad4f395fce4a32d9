// Useful work in closed form against sums over tokens.
#include "model/work.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <tuple>

#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::model {
namespace {

TEST(Work, PairsAndKeysAreSumsOverTokens) {
  for (const auto& [block, window, topk] :
       {std::tuple<int64_t, int64_t, int64_t>{16, 32, 4}, {64, 128, 3}, {32, 64, 0}}) {
    kernels::SparseAttentionConfig config;
    config.kernel_size = 8;
    config.kernel_stride = 4;
    config.block_size = block;
    config.init_blocks = 1;
    config.window_size = window;
    config.topk = topk;
    for (const int64_t n : {1, 7, 8, 9, 31, 32, 33, 96, 97, 257, 1000}) {
      double pairs = 0;
      double keys = 0;
      for (int64_t t = 0; t < n; ++t) {
        const int64_t blocks = std::min(t / block + 1, config.total_blocks());
        pairs += static_cast<double>((blocks - 1) * block + t % block + 1);
        keys += static_cast<double>(kernels::FineCount(config, t + 1) +
                                    kernels::CoarseCount(config, t + 1));
      }
      EXPECT_EQ(SparsePairs(config, n), pairs) << n << " tokens, blocks of " << block;
      EXPECT_EQ(SelectionKeys(config, n), keys) << n << " tokens, blocks of " << block;
    }
  }
}

TEST(Work, ProductWeightsAreByLayerKind) {
  ModelConfig config;
  config.vocab_size = 90;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 8;
  config.attn_use_output_gate = true;
  config.mixer_types = {"minicpm4", "lightning-attn", "lightning-attn"};
  ASSERT_TRUE(config.Resolve().ok());
  const ProductWeights weights = ProductWeightsOf(config);
  EXPECT_EQ(weights.softmax, 32 * (3 * 32 + 2 * 16));  // q, o, gate; k, v
  EXPECT_EQ(weights.linear, 2 * 32 * 5 * 32);
  EXPECT_EQ(weights.mlp, 3 * 3 * 32 * 48);
  EXPECT_EQ(weights.head, 90 * 32);
  EXPECT_EQ(ProductParameters(config), weights.all());
}

}  // namespace
}  // namespace sala::model
