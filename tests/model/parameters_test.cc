// How parameters are cut over tensor ranks and over the ranks that share them: every element once,
// the same values however it is cut.
#include "model/parameters.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace sala::model {
namespace {

ModelConfig Config(int64_t heads, int64_t kv_heads, bool tied) {
  ModelConfig c;
  c.vocab_size =
      203;  // padded for every tp above 1; with tp 8 rows are 32, and 21 ranks' worth is less
  c.hidden_size = 20;
  c.intermediate_size = 48;
  c.num_hidden_layers = 3;
  c.num_attention_heads = heads;
  c.num_key_value_heads = kv_heads;
  c.head_dim = 6;
  c.lightning_nh = heads;
  c.lightning_head_dim = 4;
  c.mixer_types = {"minicpm4", "lightning-attn", "minicpm4"};
  c.attn_use_output_gate = true;
  c.attn_qk_norm = true;
  c.tie_word_embeddings = tied;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

struct Cut {
  int64_t heads, kv_heads, ranks;
};

std::vector<Cut> Cuts() {
  return {{8, 2, 1}, {8, 2, 2}, {8, 2, 4}, {8, 2, 8}, {6, 1, 3}, {6, 3, 3}, {6, 6, 2}, {24, 3, 6}};
}

// Calls element(index in the whole tensor, index in the part) for what a rank stores of a tensor.
template <typename Element>
void ForEachElement(const ParameterSpec& spec, const Element& element) {
  const int64_t width = spec.shape.back();
  const bool matrix = spec.shape.size() == 2;
  for (int64_t i = 0; i < spec.stored; ++i) {
    const int64_t row = matrix ? i / width + spec.box_offset[0] : 0;
    element(row * spec.global_shape.back() + i % width + spec.box_offset.back(), i);
  }
}

int64_t Numel(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t d : shape) n *= d;
  return n;
}

TEST(ParameterSpecsTest, OwnersCoverEveryElementOnce) {
  for (const Cut& cut : Cuts()) {
    for (const bool tied : {false, true}) {
      const ModelConfig config = Config(cut.heads, cut.kv_heads, tied);
      ASSERT_EQ(config.TensorParallelProblem(cut.ranks), "");
      std::map<std::string, std::vector<int>> owned;
      for (const ParameterSpec& spec : ParameterSpecs(config))
        owned[spec.name].assign(static_cast<size_t>(spec.numel), 0);
      const size_t tensors = owned.size();
      int64_t stored = 0;
      for (int64_t rank = 0; rank < cut.ranks; ++rank) {
        const auto specs = ParameterSpecs(config, {rank, cut.ranks});
        EXPECT_EQ(specs.size(), tensors);
        for (const ParameterSpec& spec : specs) {
          SCOPED_TRACE(spec.name + " of rank " + std::to_string(rank) + " of " +
                       std::to_string(cut.ranks));
          EXPECT_EQ(spec.numel, Numel(spec.shape));
          EXPECT_EQ(spec.stored, Numel(spec.box_shape()));
          EXPECT_LE(spec.stored, spec.numel);
          if (spec.stored > 0) {
            for (size_t d = 0; d < spec.shape.size(); ++d)
              EXPECT_LE(spec.box_offset[d] + spec.box_shape()[d], spec.global_shape[d]);
          }
          if (!spec.owner) continue;
          stored += spec.stored;
          ForEachElement(spec, [&](int64_t whole, int64_t) {
            ++owned.at(spec.name).at(static_cast<size_t>(whole));
          });
        }
      }
      for (const auto& [name, times] : owned) {
        EXPECT_EQ(std::count(times.begin(), times.end(), 1), static_cast<int64_t>(times.size()))
            << name << " over " << cut.ranks << " ranks";
      }
      EXPECT_EQ(stored, ParameterStore(ParameterSpecs(config)).parameters());
    }
  }
}

TEST(ParameterSpecsTest, CopiesAreTheSameBoxAndComeLastInAUnit) {
  for (const Cut& cut : Cuts()) {
    const ModelConfig config = Config(cut.heads, cut.kv_heads, false);
    // How often each box of a tensor appears, and how often with an owner.
    std::map<std::pair<std::string, std::vector<int64_t>>, std::pair<int64_t, int>> boxes;
    for (int64_t rank = 0; rank < cut.ranks; ++rank) {
      const auto specs = ParameterSpecs(config, {rank, cut.ranks});
      for (size_t i = 0; i < specs.size(); ++i) {
        const ParameterSpec& spec = specs[i];
        if (spec.stored == 0) continue;
        auto& [ranks, owners] = boxes[{spec.name, spec.box_offset}];
        ++ranks;
        owners += spec.owner ? 1 : 0;
        // Behind what all hold alike nothing else follows in the unit.
        const bool follows = i + 1 < specs.size() && specs[i + 1].unit == spec.unit;
        if (cut.ranks > 1 && follows && spec.copies == cut.ranks &&
            spec.kind == ParameterKind::kVector) {
          EXPECT_EQ(specs[i + 1].copies, cut.ranks) << spec.name;
        }
      }
    }
    for (int64_t rank = 0; rank < cut.ranks; ++rank) {
      for (const ParameterSpec& spec : ParameterSpecs(config, {rank, cut.ranks})) {
        if (spec.stored == 0) continue;
        const auto& [ranks, owners] = boxes.at({spec.name, spec.box_offset});
        EXPECT_EQ(ranks, spec.copies) << spec.name;
        EXPECT_EQ(owners, 1) << spec.name;
      }
    }
  }
}

TEST(ParameterSpecsTest, LayersOfAllRanksHaveOneSize) {
  // Gradients of copies are summed piece by piece, and every rank holds the same pieces.
  for (const Cut& cut : Cuts()) {
    const ModelConfig config = Config(cut.heads, cut.kv_heads, true);
    const auto first = ParameterSpecs(config, {0, cut.ranks});
    for (int64_t rank = 1; rank < cut.ranks; ++rank) {
      const auto specs = ParameterSpecs(config, {rank, cut.ranks});
      ASSERT_EQ(specs.size(), first.size());
      for (size_t i = 0; i < specs.size(); ++i) {
        EXPECT_EQ(specs[i].name, first[i].name);
        EXPECT_EQ(specs[i].offset, first[i].offset);
        EXPECT_EQ(specs[i].shape, first[i].shape);
      }
    }
  }
}

// Values of `part` are those of `whole`, padding and gaps are zero.
void ExpectPartOf(const ParameterStore& whole, ParameterStore& part) {
  for (const ParameterSpec& spec : part.specs()) {
    const float* values = whole.data() + whole.Spec(spec.name).offset;
    std::vector<float> expected(static_cast<size_t>(spec.stored));
    ForEachElement(
        spec, [&](int64_t from, int64_t to) { expected[static_cast<size_t>(to)] = values[from]; });
    part.ForEachPart(spec, [&](int64_t begin, int64_t end) {
      ASSERT_LE(0, begin);
      ASSERT_LE(end, spec.stored);
      const float* found = part.Flat(spec.offset + begin, spec.offset + end).Data<float>();
      EXPECT_EQ(std::vector<float>(found, found + (end - begin)),
                std::vector<float>(expected.begin() + begin, expected.begin() + end))
          << spec.name;
    });
  }
}

TEST(ParameterStoreTest, ValuesDoNotDependOnTheCut) {
  for (const Cut& cut : Cuts()) {
    const ModelConfig config = Config(cut.heads, cut.kv_heads, false);
    ParameterStore whole(ParameterSpecs(config));
    InitialiseParameters(config, 5, whole);
    const std::set<float> distinct(whole.data(), whole.data() + whole.size());
    EXPECT_GT(distinct.size(), static_cast<size_t>(whole.parameters()) * 9 / 10) << "random values";
    for (int64_t rank = 0; rank < cut.ranks; ++rank) {
      const auto specs = ParameterSpecs(config, {rank, cut.ranks});
      for (const int ranks : {1, 3}) {
        const parallel::UnitPartition partition(UnitBorders(specs), ranks);
        for (int r = 0; r < ranks; ++r) {
          ParameterStore drawn(specs, Placement::Shard(partition, r));
          InitialiseParameters(config, 5, drawn);
          ExpectPartOf(whole, drawn);
        }
      }
      ParameterStore drawn(specs);
      InitialiseParameters(config, 5, drawn);
      ExpectPartOf(whole, drawn);
      // Nothing was written to padding and gaps.
      int64_t not_zero = 0;
      for (int64_t i = 0; i < drawn.size(); ++i) not_zero += drawn.data()[i] != 0 ? 1 : 0;
      EXPECT_LE(not_zero, drawn.parameters());
    }
  }
}

TEST(ParameterStoreTest, ShardsHoldEveryElementOnceAndNoMore) {
  const ModelConfig config = Config(8, 2, false);
  const auto specs = ParameterSpecs(config, {1, 2});
  for (int ranks = 1; ranks <= 5; ++ranks) {
    const parallel::UnitPartition partition(UnitBorders(specs), ranks);
    std::map<std::string, std::vector<int>> times;
    size_t bytes = 0;
    for (int r = 0; r < ranks; ++r) {
      const ParameterStore shard(specs, Placement::Shard(partition, r));
      EXPECT_FALSE(shard.whole() && ranks > 1);
      bytes += shard.bytes();
      for (const ParameterSpec& spec : shard.specs()) {
        auto& count = times[spec.name];
        count.resize(static_cast<size_t>(spec.stored));
        shard.ForEachPart(spec, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) ++count[static_cast<size_t>(i)];
        });
      }
    }
    EXPECT_EQ(bytes, ParameterStore(specs).bytes());
    for (const auto& [name, count] : times)
      EXPECT_EQ(std::count(count.begin(), count.end(), 1), static_cast<int64_t>(count.size()))
          << name << ", " << ranks << " ranks";
  }
}

TEST(ParameterStoreTest, SlotsHaveRoomForTwoLayersTheNormAndEmbeddingOrHead) {
  const ModelConfig config = Config(8, 2, false);
  const auto specs = ParameterSpecs(config);
  ParameterStore slots(specs, DType::kF32, nullptr, Placement::Slots());
  const std::vector<int64_t>& borders = slots.unit_borders();
  const auto size = [&](int64_t u) {
    return borders[static_cast<size_t>(u) + 1] - borders[static_cast<size_t>(u)];
  };
  // Layers 0 and 2 (units 1 and 3) share a slot, layer 1 has the other.
  const int64_t expected =
      std::max(size(1), size(3)) + size(2) + std::max(size(0), size(5)) + size(4);
  EXPECT_EQ(slots.bytes(), static_cast<size_t>(expected) * sizeof(float));
  const auto fill = [&](int64_t u, float value) {
    const Tensor all =
        slots.Flat(borders[static_cast<size_t>(u)], borders[static_cast<size_t>(u) + 1]);
    std::fill_n(all.Data<float>(), all.numel(), value);
  };
  const auto value_of = [&](const std::string& name) { return slots.Get(name).Data<float>()[0]; };
  fill(0, 10);
  fill(1, 11);
  fill(2, 12);
  fill(4, 14);
  EXPECT_EQ(value_of("model.embed_tokens.weight"), 10);
  EXPECT_EQ(value_of("model.layers.0.self_attn.q_proj.weight"), 11);
  EXPECT_EQ(value_of("model.layers.1.mlp.down_proj.weight"), 12);
  EXPECT_EQ(value_of("model.norm.weight"), 14);
  fill(3, 13);
  fill(5, 15);
  EXPECT_EQ(value_of("model.layers.2.self_attn.q_proj.weight"), 13);
  EXPECT_EQ(value_of("lm_head.weight"), 15);
  EXPECT_EQ(value_of("model.embed_tokens.weight"), 15) << "the head is in its slot now";
  EXPECT_EQ(value_of("model.layers.1.mlp.down_proj.weight"), 12) << "the other layer's slot";
  EXPECT_EQ(value_of("model.norm.weight"), 14);
}

}  // namespace
}  // namespace sala::model
