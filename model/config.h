// What a model computes. Field names follow the exported config.json where it has them
// (docs/formats.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/status.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::model {

enum class MixerType : uint8_t {
  kSoftmax,    // exported as "minicpm4"
  kLightning,  // exported as "lightning-attn"
};

const char* NameOf(MixerType type);

// A rank's place in its tensor-parallel group.
struct TensorShard {
  int64_t rank = 0;
  int64_t ranks = 1;
};

struct SparseConfig : kernels::SparseAttentionConfig {
  void Bind(ConfigBinder& b);
};

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000.0;
  int64_t max_position_embeddings = 524288;
  bool tie_word_embeddings = false;

  // Softmax layers. A full-attention teacher has rotary embedding and no gate; the released hybrid
  // the reverse.
  bool attn_use_rope = true;
  bool attn_qk_norm = false;
  bool attn_use_output_gate = false;

  // Linear layers: as many key/value heads as query heads.
  int64_t lightning_nh = 0;        // 0: num_attention_heads
  int64_t lightning_head_dim = 0;  // 0: head_dim
  bool lightning_use_rope = true;
  bool qk_norm = true;
  bool use_output_norm = true;
  bool use_output_gate = true;

  // "minicpm4" or "lightning-attn" per layer; empty: all softmax.
  std::vector<std::string> mixer_types;
  SparseConfig sparse;

  // muP factors: 1, sqrt(layers) and hidden_size switch them off.
  double scale_emb = 1.0;
  double scale_depth = 1.4;
  double dim_model_base = 256;
  double initializer_range = 0.1;

  // -1: the tokenizer's (a new model takes them from it).
  int64_t bos_token_id = -1;
  int64_t eos_token_id = -1;
  int64_t pad_token_id = -1;

  void Bind(ConfigBinder& b);

  // Fills derived zeros (lightning_nh, mixer_types, ...) and checks that the shapes fit: CFG-MODEL
  // (78).
  Status Resolve();

  // "" when the GPU kernels can compute this model, otherwise one sentence: key, value found, value
  // expected.
  std::string CudaProblem() const;

  // "" when the tensors can be cut over this many tensor ranks, otherwise one sentence.
  std::string TensorParallelProblem(int64_t ranks) const;
  // The model as one tensor rank computes it: its heads, MLP columns and vocabulary rows (padding
  // included); hidden_size and all factors are the model's.
  ModelConfig Local(const TensorShard& shard) const;
  // Vocabulary rows of each tensor rank, the last of which may be padding.
  int64_t VocabularyRows(int64_t ranks) const;

  MixerType mixer(int64_t layer) const;
  bool has_lightning() const;
  bool has_softmax() const;
  double residual_scale() const;  // scale_depth / sqrt(layers)
  double width_multiplier() const {
    return static_cast<double>(hidden_size) / dim_model_base;
  }  // m of muP
  int64_t attention_width() const { return num_attention_heads * head_dim; }
  int64_t kv_width() const { return num_key_value_heads * head_dim; }
  int64_t lightning_width() const { return lightning_nh * lightning_head_dim; }
};

}  // namespace sala::model
