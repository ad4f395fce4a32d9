#include "tests/cuda/bench/shapes.h"

#include <algorithm>

#include "core/check.h"

namespace sala::bench {
namespace {

model::ModelConfig Common(bool smoke, int64_t layers) {
  model::ModelConfig c;
  c.num_hidden_layers = layers;
  c.scale_emb = 12;
  if (smoke) {
    c.vocab_size = 96;
    c.hidden_size = 64;
    c.intermediate_size = 96;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 16;
    c.dim_model_base = 16;
    static_cast<kernels::SparseAttentionConfig&>(c.sparse) = {.kernel_size = 8,
                                                              .kernel_stride = 4,
                                                              .block_size = 16,
                                                              .init_blocks = 1,
                                                              .window_size = 32,
                                                              .topk = 4,
                                                              .dense_len = 64};
    return c;
  }
  c.vocab_size = 73448;
  c.hidden_size = 4096;
  c.intermediate_size = 16384;
  c.num_attention_heads = 32;
  c.num_key_value_heads = 2;
  c.head_dim = 128;
  return c;
}

void Resolve(model::ModelConfig& config) {
  const Status status = config.Resolve();
  SALA_CHECK(status.ok()) << MessageOf(status);
}

void MakeHybrid(model::ModelConfig& c) {
  c.attn_use_rope = false;
  c.attn_use_output_gate = true;
}

}  // namespace

model::ModelConfig HybridStack(bool smoke, int64_t layers) {
  model::ModelConfig c = Common(smoke, layers);
  MakeHybrid(c);
  for (int64_t layer = 0; layer < layers; ++layer) {
    c.mixer_types.emplace_back(layer % 4 == 0 ? "minicpm4" : "lightning-attn");
  }
  Resolve(c);
  return c;
}

model::ModelConfig TeacherStack(bool smoke, int64_t layers) {
  model::ModelConfig c = Common(smoke, layers);
  Resolve(c);
  return c;
}

model::ModelConfig ReleasedModel() {
  model::ModelConfig c = Common(false, 32);
  MakeHybrid(c);
  c.mixer_types.assign(32, "lightning-attn");
  for (size_t layer : {0U, 9U, 16U, 17U, 22U, 29U, 30U, 31U}) c.mixer_types[layer] = "minicpm4";
  Resolve(c);
  return c;
}

}  // namespace sala::bench
