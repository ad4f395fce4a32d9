// Where numbers or shapes are at an edge: documents of one token and of one token more or less than
// blocks have, rows that see no compressed key, blocks that tie, labels that are all masked,
// activations far from 1. Each against the float64 reference, gradients included.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "model/loss.h"
#include "model/reference.h"
#include "model/reference_model.h"
#include "tests/core/context_test_base.h"
#include "tests/model/cases.h"
#include "tests/model/reference_check.h"

namespace sala::model {
namespace {

using testing::ExpectComplexStep;
using testing::ExpectFastPathAgrees;
using testing::HybridConfig;
using testing::kSafeMargin;
using testing::RandomBatch;
using testing::RandomParameters;
using testing::TeacherConfig;

class EdgesTest : public sala::testing::ContextTest {
 protected:
  ReferenceResult Agree(const std::string& what, const ModelConfig& config,
                        const RunOptions& options, const Batch& batch) {
    return ExpectFastPathAgrees(ctx_, arena_, what, config, RandomParameters(config), options,
                                batch);
  }
};

constexpr RunOptions kSparse = {.sparse_attention = true};

// One softmax and one linear layer.
ModelConfig TwoLayers(const kernels::SparseAttentionConfig& sparse) {
  ModelConfig c = HybridConfig();
  c.num_hidden_layers = 2;
  c.mixer_types = {"minicpm4", "lightning-attn"};
  static_cast<kernels::SparseAttentionConfig&>(c.sparse) = sparse;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

// The blocks that the softmax layer 0 chooses for each token and key/value head.
std::vector<ChosenBlocks> Chosen(const ModelConfig& config, const Batch& batch) {
  const ParameterStore store = RandomParameters(config);
  const ReferenceModel<double> model(
      config, store.specs(), std::vector<double>(store.data(), store.data() + store.size()));
  ReferenceTrace<double> trace;
  model.Hidden(batch, kSparse, &trace);
  return trace.layers[0].mixer.chosen;
}

void CheckReference(const ModelConfig& config, const Batch& batch) {
  const ParameterStore store = RandomParameters(config);
  const ReferenceResult result = ReferenceCrossEntropy(config, store, batch, kSparse, 1.0);
  ExpectComplexStep(
      "reference", store, result.gradients, [&](const std::vector<testing::Complex>& point) {
        return testing::ComplexModel(config, store.specs(), point).LossSum(batch, kSparse);
      });
}

// A budget of 4 blocks of 4 tokens, and coarse windows of 32: tokens 16 to 30 leave blocks out and
// see no coarse key. All scores are 0 there, and the lowest free block is taken.
TEST_F(EdgesTest, RowsThatSeeNoCoarseKey) {
  const ModelConfig config = TwoLayers({.kernel_size = 8,
                                        .kernel_stride = 4,
                                        .block_size = 4,
                                        .init_blocks = 1,
                                        .window_size = 4,
                                        .topk = 3,
                                        .dense_len = 8});
  for (const int32_t n : {17, 30, 31, 32, 33, 45}) {
    const Batch batch = RandomBatch(config, {n}, "coarse");
    Agree("no coarse key, " + std::to_string(n), config, kSparse, batch);
    const ChosenBlocks chosen = Chosen(config, batch)[0];
    for (int64_t t = 16; t < std::min(n, 31); ++t) {
      const int64_t own = t / 4;
      for (int64_t g = 0; g < 2; ++g) {
        EXPECT_EQ(chosen[static_cast<size_t>(2 * t + g)],
                  (std::vector<int64_t>{0, 1, own - 1, own}))
            << t;
      }
    }
  }
  CheckReference(config, RandomBatch(config, {45}, "coarse"));
}

// Blocks of 8, of which 4 are seen: every length of a last block, packed and alone.
TEST_F(EdgesTest, PartialLastBlocks) {
  const ModelConfig config = HybridConfig();
  std::vector<int32_t> lengths;
  for (int32_t n = 64; n <= 72; ++n) {
    lengths.push_back(n);
    const auto result = Agree("last block of " + std::to_string(n), config, kSparse,
                              RandomBatch(config, {n}, "partial"));
    EXPECT_GT(result.selection_margin, kSafeMargin) << n << ": take another seed";
  }
  const auto result = Agree("packed", config, kSparse, RandomBatch(config, lengths, "p2"));
  EXPECT_GT(result.selection_margin, kSafeMargin) << "take another seed";
}

TEST_F(EdgesTest, DocumentsOfOneToken) {
  for (ModelConfig config : {HybridConfig(), TeacherConfig()}) {
    config.sparse.dense_len = 1;  // sparse even so
    for (const RunOptions& options : {RunOptions(), kSparse}) {
      for (const std::vector<int32_t>& lengths :
           {std::vector<int32_t>{1}, std::vector<int32_t>{1, 1, 1, 1, 1},
            std::vector<int32_t>{1, 40, 1}}) {
        Batch batch = RandomBatch(config, lengths, "p2");
        batch.labels.assign(batch.tokens.size(), 5);  // of another document, or of none
        Agree("one token", config, options, batch);
      }
    }
  }
  ModelConfig config = HybridConfig();
  config.sparse.dense_len = 1;
  Batch batch = RandomBatch(config, {1, 1, 20}, "single");
  batch.labels.assign(batch.tokens.size(), 5);
  CheckReference(config, batch);
}

TEST_F(EdgesTest, AllLabelsMasked) {
  for (const ModelConfig& config : {HybridConfig(), TeacherConfig()}) {
    ParameterStore store = RandomParameters(config);
    Batch batch = RandomBatch(config, {40, 1, 9}, "masked");
    batch.labels.assign(batch.tokens.size(), -1);
    ParameterStore gradients(store.specs());
    const auto result = CrossEntropyStep(ctx_, arena_, Model(config, store), batch, kSparse, 1.0F,
                                         BindTensors(config, gradients));
    EXPECT_EQ(result.loss_sum, 0);
    EXPECT_EQ(result.targets, 0);
    const ReferenceResult reference = ReferenceCrossEntropy(config, store, batch, kSparse, 1.0);
    EXPECT_EQ(reference.loss_sum, 0);
    EXPECT_EQ(reference.count, 0);
    for (int64_t i = 0; i < store.size(); ++i) {
      ASSERT_EQ(gradients.data()[i], 0.0F) << i;
      ASSERT_EQ(reference.gradients[static_cast<size_t>(i)], 0.0) << i;
    }
  }
}

// 96 blocks, of which 34 are forced and 62 free, as in the released model, in blocks of 4 tokens:
// documents of 33, 34, 35 and of 95, 96, 97 blocks, and of one token less and more.
TEST_F(EdgesTest, ReleasedBlockNumbers) {
  const ModelConfig config = TwoLayers({.kernel_size = 4,
                                        .kernel_stride = 2,
                                        .block_size = 4,
                                        .init_blocks = 1,
                                        .window_size = 128,
                                        .topk = 64,
                                        .dense_len = 8});
  ASSERT_EQ(config.sparse.total_blocks(), 96);
  ASSERT_EQ(config.sparse.free_blocks(), 62);
  for (const int32_t blocks : {33, 34, 35, 95, 96, 97}) {
    for (const int32_t more : {-1, 0, 1}) {
      const int32_t n = 4 * blocks + more;
      const std::string what = std::to_string(n) + " tokens";
      const Batch batch = RandomBatch(config, {n}, "released");
      const ReferenceResult result = Agree(what, config, kSparse, batch);
      // From 385 tokens on the last block's rows leave one out.
      EXPECT_EQ(std::isfinite(result.selection_margin), n > 384) << what;
      EXPECT_GT(result.selection_margin, kSafeMargin) << what << ": take another seed";
      const ChosenBlocks chosen = Chosen(config, batch)[0];
      for (int64_t t = 0; t < n; ++t) {
        const int64_t own = t / 4;
        for (int64_t g = 0; g < 2; ++g) {
          const auto& seen = chosen[static_cast<size_t>(2 * t + g)];
          ASSERT_EQ(static_cast<int64_t>(seen.size()), std::min<int64_t>(96, own + 1)) << t;
          ASSERT_EQ(seen.front(), 0);
          // The 33 local blocks, the own one included.
          for (int64_t b = std::max<int64_t>(0, own - 32); b <= own; ++b)
            ASSERT_TRUE(std::binary_search(seen.begin(), seen.end(), b)) << t;
        }
      }
      // As long as nothing is left out the layer is dense attention.
      if (n <= 384) {
        const ReferenceResult dense =
            ReferenceCrossEntropy(config, RandomParameters(config), batch, {}, 0.5);
        EXPECT_EQ(result.hidden, dense.hidden) << what;
        EXPECT_EQ(result.gradients, dense.gradients) << what;
      }
    }
  }
}

// Without rotation equal tokens have equal keys in the first layer, so that block scores tie to the
// bit in either arithmetic: the lowest blocks are taken.
TEST_F(EdgesTest, BlocksThatTie) {
  const ModelConfig config = TwoLayers(HybridConfig().sparse);
  Batch same = RandomBatch(config, {75}, "tie");
  same.tokens.assign(same.tokens.size(), 7);
  const ReferenceResult result = Agree("one token repeated", config, kSparse, same);
  EXPECT_EQ(result.selection_margin, 0);
  const ChosenBlocks chosen = Chosen(config, same)[0];
  for (int64_t t = 32; t < 75; ++t) {
    const int64_t own = t / 8;
    for (int64_t g = 0; g < 2; ++g) {
      ASSERT_EQ(chosen[static_cast<size_t>(2 * t + g)], (std::vector<int64_t>{0, 1, own - 1, own}))
          << t;
    }
  }
  CheckReference(config, same);
  // A period of one block and of half a block: blocks repeat, tokens differ.
  for (const size_t period : {size_t{8}, size_t{4}}) {
    Batch batch = RandomBatch(config, {75}, "period");
    for (size_t t = period; t < batch.tokens.size(); ++t)
      batch.tokens[t] = batch.tokens[t - period];
    EXPECT_EQ(Agree("period", config, kSparse, batch).selection_margin, 0);
  }
}

// The residual stream begins at `scale_emb` times 0.1 and what the layers add is of size 1: the
// norms bring everything back to size 1, or, below 1e-3 (the root of epsilon), to 1e3 times itself.
TEST_F(EdgesTest, ActivationsFarFromOne) {
  for (const double scale : {1e-20, 1e-10, 1e10, 1e20}) {
    for (ModelConfig config : {HybridConfig(), TeacherConfig()}) {
      config.scale_emb = scale;
      ParameterStore store = RandomParameters(config);
      const Batch batch = RandomBatch(config, {40, 1, 9}, "far");
      const ReferenceResult expected = ReferenceCrossEntropy(config, store, batch, {}, 1.0);
      ASSERT_TRUE(std::isfinite(expected.loss_sum));
      ParameterStore gradients(store.specs());
      const auto result = CrossEntropyStep(ctx_, arena_, Model(config, store), batch, {}, 1.0F,
                                           BindTensors(config, gradients));
      EXPECT_NEAR(result.loss_sum, expected.loss_sum, testing::kRelative * expected.loss_sum);
      for (const ParameterSpec& spec : store.specs()) {
        const double* reference = expected.gradients.data() + spec.offset;
        double largest = 0;
        for (int64_t i = 0; i < spec.numel; ++i)
          largest = std::max(largest, std::abs(reference[i]));
        // Products of several tiny factors leave float32 below 1e-38, and with them the digits of
        // gradients that are about as small; nothing of these reaches an update.
        const double lost = largest < 1e-25 ? 1e-25 : 0;
        for (int64_t i = 0; i < spec.numel; ++i) {
          ASSERT_NEAR(gradients.data()[spec.offset + i], reference[i],
                      testing::kRelative * largest + lost)
              << spec.name << " at scale " << scale;
        }
      }
    }
  }
}

}  // namespace
}  // namespace sala::model
