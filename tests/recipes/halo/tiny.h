// A tiny teacher and batches for the tests of the HALO stage.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "core/rng.h"
#include "model/model.h"
#include "recipes/halo/transfer.h"

namespace sala::recipes::testing {

class HaloTest : public ::testing::Test {
 protected:
  HaloTest() : pool_(1) {
    ctx_.pool = &pool_;
    ctx_.scratch = &scratch_;
  }

  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
};

inline model::ModelConfig TeacherConfig() {
  model::ModelConfig c;
  c.vocab_size = 41;
  c.hidden_size = 24;
  c.intermediate_size = 32;
  c.num_hidden_layers = 4;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 6;
  c.attn_qk_norm = true;
  c.dim_model_base = 12;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

// Random weights, gains random around 1 so that their copies can be told from ones.
inline model::ParameterStore RandomTeacher(const model::ModelConfig& config) {
  model::ParameterStore store(model::ParameterSpecs(config));
  model::InitialiseParameters(config, 5, store);
  PhiloxStream rng("v1|5|halo_test||0|gains|");
  for (const model::ParameterSpec& spec : store.specs()) {
    float* data = store.data() + spec.offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (spec.kind == model::ParameterKind::kVector)
        data[i] += static_cast<float>(0.2 * rng.NextNormal());
      if (spec.kind == model::ParameterKind::kMatrix) data[i] *= 2;  // attention away from uniform
    }
  }
  return store;
}

// Packed random documents; labels are the next tokens inside each.
inline model::Batch RandomBatch(const model::ModelConfig& config,
                                const std::vector<int32_t>& lengths, const std::string& name) {
  PhiloxStream rng("v1|5|halo_test||0|tokens|" + name);
  model::Batch batch;
  batch.cu_seqlens = {0};
  for (int32_t n : lengths) {
    for (int32_t i = 0; i < n; ++i) {
      batch.tokens.push_back(
          static_cast<int32_t>(rng.Bounded(static_cast<uint64_t>(config.vocab_size))));
      batch.positions.push_back(i);
    }
    for (int32_t i = 0; i < n; ++i) {
      const auto next = static_cast<size_t>(batch.cu_seqlens.back() + i + 1);
      batch.labels.push_back(i + 1 < n ? batch.tokens[next] : -1);
    }
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + n);
  }
  return batch;
}

inline std::vector<float> Bits(const model::ParameterStore& store) {
  return {store.data(), store.data() + store.size()};
}

inline std::vector<float> Values(const ConstTensor& x) {
  const auto* data = x.Data<float>();
  return {data, data + x.numel()};
}

}  // namespace sala::recipes::testing
