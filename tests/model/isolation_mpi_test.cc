// Documents do not touch each other on any mesh of cp x tp ranks: a token that changes in one
// document, on another rank or on the same one, changes no bit of another document's losses, nor of
// a gradient that only other documents have labels for. Run under mpirun: every rank runs every
// test, on all meshes of that many ranks.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "model/loss.h"
#include "model/model.h"
#include "parallel/mesh.h"
#include "tests/model/cases.h"
#include "tests/parallel/mpi_test_main.h"

namespace sala::model {
namespace {

parallel::Communicator* world = nullptr;

ModelConfig Config(const std::vector<std::string>& mixers) {
  ModelConfig c;
  c.vocab_size = 203;  // tp 2 and 4: padded rows
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_hidden_layers = static_cast<int64_t>(mixers.size());
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;  // tp 4: two ranks for each
  c.head_dim = 8;
  c.lightning_nh = 4;
  c.lightning_head_dim = 6;
  c.mixer_types = mixers;
  c.attn_use_output_gate = true;
  c.attn_qk_norm = true;
  c.scale_emb = 12;
  c.dim_model_base = 6;
  static_cast<kernels::SparseAttentionConfig&>(c.sparse) = {.kernel_size = 4,
                                                            .kernel_stride = 2,
                                                            .block_size = 8,
                                                            .init_blocks = 1,
                                                            .window_size = 8,
                                                            .topk = 3,
                                                            .dense_len = 24};
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

// One document of a batch and a token of it that changes.
struct Change {
  std::vector<int32_t> lengths;
  size_t document;
  int32_t token;  // of the document

  std::string Text() const {
    std::string text = "documents";
    for (const int32_t n : lengths) text += " " + std::to_string(n);
    return text + ", token " + std::to_string(token) + " of document " + std::to_string(document);
  }
};

// Ranges of 225 tokens over cp 2, 4 and 8 have any length and begin inside blocks of 8 and of
// documents; those of 679 are multiples of 16. A short document stays dense. The last two changes
// are next to another document: the first and the last token.
std::vector<Change> Changes() {
  return {{{75, 77, 73}, 1, 25},           {{75, 77, 73}, 0, 3},
          {{19, 300, 203, 23, 134}, 1, 5}, {{19, 300, 203, 23, 134}, 3, 11},
          {{19, 300, 203, 23, 134}, 2, 0}, {{19, 300, 203, 23, 134}, 2, 202}};
}

class IsolationTest : public ::testing::TestWithParam<std::vector<std::string>> {
 protected:
  IsolationTest() : pool_(1) {
    ctx_.pool = &pool_;
    ctx_.scratch = &scratch_;
  }

  struct Result {
    std::vector<float> losses;     // of this rank's range
    std::vector<float> gradients;  // this rank's terms
  };

  // Weights away from the linear regime of scores and gates; the same for every mesh.
  static ParameterStore Parameters(const ModelConfig& config, const TensorShard& shard) {
    ParameterStore store(ParameterSpecs(config, shard));
    InitialiseParameters(config, 11, store);
    for (const ParameterSpec& spec : store.specs()) {
      if (spec.kind != ParameterKind::kMatrix) continue;
      for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i) store.data()[i] *= 3;
    }
    return store;
  }

  Result Run(const ModelConfig& config, const Spread& spread, const Batch& batch,
             const RunOptions& options) {
    ParameterStore store = Parameters(config, spread.shard());
    const Model model(config, store, spread);
    Result result;
    result.losses.resize(static_cast<size_t>(spread.Share(batch.size()).tokens()));
    EvaluateCrossEntropy(
        ctx_, arena_, model, batch, options,
        Tensor(result.losses.data(), {static_cast<int64_t>(result.losses.size())}));
    ParameterStore gradients(store.specs());
    CrossEntropyStep(ctx_, arena_, model, batch, options, 1.0F, BindTensors(config, gradients));
    result.gradients.assign(gradients.data(), gradients.data() + gradients.size());
    return result;
  }

  // Over all ranks.
  static int64_t Total(int64_t mine) {
    EXPECT_TRUE(world->AllReduce(std::span<int64_t>(&mine, 1), parallel::Reduce::kSum).ok());
    return mine;
  }
  static int64_t DifferentBits(const std::vector<float>& a, const std::vector<float>& b) {
    int64_t n = 0;
    for (size_t i = 0; i < a.size(); ++i)
      n += std::memcmp(&a[i], &b[i], sizeof(float)) != 0 ? 1 : 0;
    return n;
  }

  void Check(const ModelConfig& config, const parallel::MeshConfig& mesh_config,
             const Change& change, const RunOptions& options);

  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
};

void IsolationTest::Check(const ModelConfig& config, const parallel::MeshConfig& mesh_config,
                          const Change& change, const RunOptions& options) {
  const auto mesh = parallel::Mesh::Create(*world, mesh_config);
  ASSERT_TRUE(mesh.ok()) << mesh.status();
  const Spread spread(**mesh);
  const Batch batch = testing::RandomBatch(config, change.lengths, "isolation");
  const int64_t first = batch.cu_seqlens[change.document];
  const int64_t last = batch.cu_seqlens[change.document + 1];
  const int64_t at = first + change.token;

  const auto changed = [&](Batch other) {
    int32_t& token = other.tokens[static_cast<size_t>(at)];
    token = (token + 1) % static_cast<int32_t>(config.vocab_size);
    return other;
  };
  const Result before = Run(config, spread, batch, options);
  const Result after = Run(config, spread, changed(batch), options);
  const TokenShare share = spread.Share(batch.size());
  int64_t inside = 0;
  for (int64_t t = share.begin; t < share.end; ++t) {
    const auto i = static_cast<size_t>(t - share.begin);
    const bool same = std::memcmp(&before.losses[i], &after.losses[i], sizeof(float)) == 0;
    if (at <= t && t < last) {
      inside += same ? 0 : 1;
    } else {
      EXPECT_TRUE(same) << "token " << t << ": " << before.losses[i] << " became "
                        << after.losses[i];
    }
  }
  // What follows in the document sees the change. Nothing follows its last token, which has no
  // label.
  const bool visible = at + 1 < last;
  EXPECT_EQ(Total(inside) > 0, visible);
  EXPECT_EQ(Total(DifferentBits(before.gradients, after.gradients)) > 0, visible);

  // Labels of the other documents only.
  Batch others = batch;
  std::fill(others.labels.begin() + first, others.labels.begin() + last, -1);
  const Result without = Run(config, spread, others, options);
  const Result with = Run(config, spread, changed(others), options);
  EXPECT_EQ(DifferentBits(without.gradients, with.gradients), 0);
  EXPECT_GT(Total(DifferentBits(without.gradients, before.gradients)), 0);
}

TEST_P(IsolationTest, AChangeStaysInItsDocument) {
  const ModelConfig config = Config(GetParam());
  for (int64_t tp = 1; tp <= 4; tp *= 2) {
    if (world->size() % tp != 0) continue;
    const parallel::MeshConfig mesh = {.dp = 1, .cp = world->size() / tp, .tp = tp};
    for (const Change& change : Changes()) {
      for (const bool sparse : {false, true}) {
        SCOPED_TRACE("cp " + std::to_string(mesh.cp) + ", tp " + std::to_string(mesh.tp) +
                     (sparse ? ", sparse, " : ", dense, ") + change.Text());
        Check(config, mesh, change, {.sparse_attention = sparse});
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Mixers, IsolationTest,
    ::testing::Values(std::vector<std::string>{"minicpm4", "minicpm4"},
                      std::vector<std::string>{"lightning-attn", "lightning-attn"},
                      std::vector<std::string>{"minicpm4", "lightning-attn", "minicpm4"}));

int Main(int argc, char** argv) { return sala::testing::RunTestsOnRanks(argc, argv, &world); }

}  // namespace
}  // namespace sala::model

int main(int argc, char** argv) { return sala::model::Main(argc, argv); }
