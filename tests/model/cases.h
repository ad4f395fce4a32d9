// Tiny models and batches for the tests of the model.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/rng.h"
#include "model/model.h"

namespace sala::model::testing {

inline ModelConfig HybridConfig() {
  ModelConfig c;
  c.vocab_size = 37;
  c.hidden_size = 24;
  c.intermediate_size = 40;
  c.num_hidden_layers = 4;
  c.num_attention_heads = 4;
  c.num_key_value_heads = 2;
  c.head_dim = 8;
  c.lightning_nh = 3;
  c.lightning_head_dim = 6;
  c.mixer_types = {"minicpm4", "lightning-attn", "lightning-attn", "minicpm4"};
  c.attn_use_rope = false;
  c.attn_use_output_gate = true;
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

// The hybrid with full attention only, query/key norm and a tied head.
inline ModelConfig TeacherOf(ModelConfig c) {
  c.mixer_types.assign(4, "minicpm4");
  c.attn_use_rope = true;
  c.attn_qk_norm = true;
  c.attn_use_output_gate = false;
  c.tie_word_embeddings = true;
  return c;
}

inline ModelConfig TeacherConfig() { return TeacherOf(HybridConfig()); }

inline Batch RandomBatch(const ModelConfig& config, const std::vector<int32_t>& lengths,
                         const std::string& seed) {
  PhiloxStream rng("v1|7|model_test||0|tokens|" + seed);
  Batch batch;
  batch.cu_seqlens = {0};
  for (int32_t n : lengths) {
    for (int32_t i = 0; i < n; ++i) {
      batch.tokens.push_back(
          static_cast<int32_t>(rng.Bounded(static_cast<uint64_t>(config.vocab_size))));
      batch.positions.push_back(i);
    }
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + n);
  }
  for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
    for (int32_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t) {
      batch.labels.push_back(
          t + 1 < batch.cu_seqlens[s + 1] ? batch.tokens[static_cast<size_t>(t) + 1] : -1);
    }
  }
  return batch;
}

// Random weights; norm gains random around 1, so that their gradients are tested away from a
// special point.
inline ParameterStore RandomParameters(const ModelConfig& config) {
  ParameterStore store(ParameterSpecs(config));
  InitialiseParameters(config, 11, store);
  PhiloxStream rng("v1|7|model_test||0|gains|");
  for (const ParameterSpec& spec : store.specs()) {
    float* data = store.data() + spec.offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (spec.kind == ParameterKind::kVector)
        data[i] += static_cast<float>(0.2 * rng.NextNormal());
      if (spec.kind == ParameterKind::kMatrix)
        data[i] *= 3;  // scores and gates away from the linear regime
    }
  }
  return store;
}

// Float32 rounding (2^-24 each) through the chain: about 12 rounded tensors a layer, 4 layers,
// reductions of at most 64 terms, adding up as a random walk: sqrt(12 * 4 * 64) * 2^-24 = 3.3e-6.
// Norms and softmax have condition numbers of a few; factor 8.
constexpr double kRelative = 8 * 3.3e-6;

}  // namespace sala::model::testing
