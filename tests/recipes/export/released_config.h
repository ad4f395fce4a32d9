// config.json and tensor shapes of the released 9B model, written down from its public files, not
// computed.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace sala::recipes {

inline nlohmann::json ReleasedConfig() {
  nlohmann::json config = nlohmann::json::parse(R"json({
    "architectures": ["MiniCPMSALAForCausalLM"], "model_type": "minicpm_sala", "dtype": "bfloat16",
    "vocab_size": 73448, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 524288, "rope_theta": 10000.0, "rope_scaling": null, "rms_norm_eps": 1e-06,
    "attention_bias": false, "attention_dropout": 0.0, "initializer_range": 0.1, "scale_emb": 12, "scale_depth": 1.4,
    "dim_model_base": 256, "mup_denominator": 32, "tie_word_embeddings": false, "pretraining_tp": 1, "use_cache": true,
    "shift_labels": true, "bos_token_id": 1, "eos_token_id": [2, 73440], "pad_token_id": 2,
    "attn_use_rope": false, "attn_use_output_gate": true, "lightning_nh": 32, "lightning_nkv": 32,
    "lightning_head_dim": 128, "lightning_scale": "1/sqrt(d)", "lightning_use_rope": true, "qk_norm": true,
    "use_output_norm": true, "use_output_gate": true,
    "sparse_config": {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64, "window_size": 2048,
                      "topk": 64, "use_nope": false, "dense_len": 8192}})json");
  const std::set<int> softmax = {0, 9, 16, 17, 22, 29, 30, 31};
  config["mixer_types"] = nlohmann::json::array();
  for (int layer = 0; layer < 32; ++layer) {
    config["mixer_types"].push_back(softmax.count(layer) > 0 ? "minicpm4" : "lightning-attn");
  }
  return config;
}

inline std::map<std::string, std::vector<int64_t>> ReleasedShapes() {
  const std::set<int> softmax_layers = {0, 9, 16, 17, 22, 29, 30, 31};
  const std::vector<int64_t> square = {4096, 4096};
  std::map<std::string, std::vector<int64_t>> shapes = {
      {"model.embed_tokens.weight", {73448, 4096}},
      {"model.norm.weight", {4096}},
      {"lm_head.weight", {73448, 4096}}};
  for (int layer = 0; layer < 32; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string attention = prefix + "self_attn.";
    const bool softmax = softmax_layers.count(layer) > 0;
    shapes[prefix + "input_layernorm.weight"] = {4096};
    shapes[prefix + "post_attention_layernorm.weight"] = {4096};
    shapes[prefix + "mlp.gate_proj.weight"] = {16384, 4096};
    shapes[prefix + "mlp.up_proj.weight"] = {16384, 4096};
    shapes[prefix + "mlp.down_proj.weight"] = {4096, 16384};
    shapes[attention + "q_proj.weight"] = square;
    shapes[attention + "o_proj.weight"] = square;
    shapes[attention + "k_proj.weight"] = softmax ? std::vector<int64_t>{256, 4096} : square;
    shapes[attention + "v_proj.weight"] = softmax ? std::vector<int64_t>{256, 4096} : square;
    if (softmax) {
      shapes[attention + "o_gate.weight"] = square;
      continue;
    }
    shapes[attention + "z_proj.weight"] = square;
    shapes[attention + "q_norm.weight"] = {128};
    shapes[attention + "k_norm.weight"] = {128};
    shapes[attention + "o_norm.weight"] = {4096};
  }
  return shapes;
}

}  // namespace sala::recipes
