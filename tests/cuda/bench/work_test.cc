// The counting rules against numbers worked out by hand for the 9B model.
#include "model/work.h"

#include <gtest/gtest.h>

#include "tests/cuda/bench/shapes.h"

namespace sala::bench {
namespace {

constexpr double kGiga = 1e9;

TEST(BenchWork, ParametersOfTheReleasedModel) {
  // 8 layers of 52.4M + 201.3M, 24 of 83.9M + 201.3M, head 300.8M.
  EXPECT_NEAR(model::ProductParameters(ReleasedModel()), 9.176e9, 0.001e9);
}

// GFLOP per token of the forward pass at these lengths: 18.35 of products, 0.050 of Lightning, and
// the attention and selection of 8 layers.
TEST(BenchWork, ForwardPassOfTheReleasedModel) {
  struct Row {
    int64_t n;
    double attention, selection, step;
  };
  for (const Row& row : {Row{4096, 0.27, 0, 56.0}, Row{32768, 0.73, 0.08, 57.5},
                         Row{131072, 0.78, 0.34, 57.9}, Row{532480, 0.80, 1.36, 59.0}}) {
    const model::ForwardWork work = model::ForwardWorkOf(ReleasedModel(), true, row.n);
    const double unit = kGiga * static_cast<double>(row.n);
    EXPECT_NEAR(work.products / unit, 18.35, 0.01);
    EXPECT_NEAR(work.lightning / unit, 0.050, 0.001);
    EXPECT_NEAR(work.attention / unit, row.attention, 0.01) << row.n;
    EXPECT_NEAR(work.selection / unit, row.selection, 0.01) << row.n;
    EXPECT_NEAR(work.step() / unit, row.step, 0.1) << row.n;
  }
}

TEST(BenchWork, PairsBySummingOverTokens) {
  const kernels::SparseAttentionConfig config = {.kernel_size = 8,
                                                 .kernel_stride = 4,
                                                 .block_size = 16,
                                                 .init_blocks = 1,
                                                 .window_size = 32,
                                                 .topk = 4,
                                                 .dense_len = 64};
  for (const int64_t n : {1, 16, 95, 96, 97, 200}) {
    double pairs = 0;
    double keys = 0;
    for (int64_t t = 0; t < n; ++t) {
      // 6 blocks: the own one up to the token itself, and 5 whole ones where there are as many.
      pairs += static_cast<double>(std::min(t / 16, int64_t{5}) * 16 + t % 16 + 1);
      keys += static_cast<double>(std::max(int64_t{0}, (t + 1) / 4 - 1) +
                                  std::max(int64_t{0}, (t + 1) / 16 - 1));
    }
    EXPECT_EQ(model::SparsePairs(config, n), pairs) << n;
    EXPECT_EQ(model::SelectionKeys(config, n), keys) << n;
  }
  EXPECT_EQ(model::CausalPairs(4), 10);
}

TEST(BenchWork, StacksKeepTheProportionsOfTheModel) {
  const model::ModelConfig hybrid = HybridStack(false, 4);
  EXPECT_EQ(hybrid.mixer(0), model::MixerType::kSoftmax);
  for (int64_t layer = 1; layer < 4; ++layer)
    EXPECT_EQ(hybrid.mixer(layer), model::MixerType::kLightning);
  EXPECT_FALSE(TeacherStack(false, 4).has_lightning());
  // Per token and layer, a quarter of the products of 8 softmax and 24 Lightning layers.
  const double per_layer = (model::ProductParameters(hybrid) - 73448.0 * 4096) / 4;
  const double released = (model::ProductParameters(ReleasedModel()) - 73448.0 * 4096) / 32;
  EXPECT_EQ(per_layer, released);
}

}  // namespace
}  // namespace sala::bench
