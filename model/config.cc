#include "model/config.h"

#include <algorithm>
#include <cmath>

namespace sala::model {

const char* NameOf(MixerType type) {
  return type == MixerType::kSoftmax ? "minicpm4" : "lightning-attn";
}

void SparseConfig::Bind(ConfigBinder& b) {
  b.Field("kernel_size", &kernel_size, {.min = 1});
  b.Field("kernel_stride", &kernel_stride, {.min = 1});
  b.Field("init_blocks", &init_blocks, {.min = 0});
  b.Field("block_size", &block_size, {.min = 1});
  b.Field("window_size", &window_size, {.min = 0});
  b.Field("topk", &topk, {.min = 0});
  b.Field("dense_len", &dense_len, {.min = 0});
}

void ModelConfig::Bind(ConfigBinder& b) {
  const FieldOptions positive_required{.required = true, .min = 1};
  b.Field("vocab_size", &vocab_size, {.min = 0});
  b.Field("hidden_size", &hidden_size, positive_required);
  b.Field("intermediate_size", &intermediate_size, positive_required);
  b.Field("num_hidden_layers", &num_hidden_layers, positive_required);
  b.Field("num_attention_heads", &num_attention_heads, positive_required);
  b.Field("num_key_value_heads", &num_key_value_heads, positive_required);
  b.Field("head_dim", &head_dim, positive_required);
  b.Field("rms_norm_eps", &rms_norm_eps, {.min = 0});
  b.Field("rope_theta", &rope_theta, {.min = 1});
  b.Field("max_position_embeddings", &max_position_embeddings, {.min = 1});
  b.Field("tie_word_embeddings", &tie_word_embeddings);
  b.Field("attn_use_rope", &attn_use_rope);
  b.Field("attn_qk_norm", &attn_qk_norm);
  b.Field("attn_use_output_gate", &attn_use_output_gate);
  b.Field("lightning_nh", &lightning_nh, {.min = 0});
  b.Field("lightning_head_dim", &lightning_head_dim, {.min = 0});
  b.Field("lightning_use_rope", &lightning_use_rope);
  b.Field("qk_norm", &qk_norm);
  b.Field("use_output_norm", &use_output_norm);
  b.Field("use_output_gate", &use_output_gate);
  b.Field("mixer_types", &mixer_types);
  b.Section("sparse_config", &sparse);
  b.Field("scale_emb", &scale_emb);
  b.Field("scale_depth", &scale_depth, {.min = 0});
  b.Field("dim_model_base", &dim_model_base, {.min = 1});
  b.Field("initializer_range", &initializer_range, {.min = 0});
  b.Field("bos_token_id", &bos_token_id, {.min = -1});
  b.Field("eos_token_id", &eos_token_id, {.min = -1});
  b.Field("pad_token_id", &pad_token_id, {.min = -1});
}

Status ModelConfig::Resolve() {
  const auto error = [](const std::string& text) {
    return MakeError(ExitCode::kConfig, "CFG-MODEL", text);
  };
  if (vocab_size < 1) return error("model.vocab_size is not known: set it, or name a tokenizer");
  if (num_attention_heads % num_key_value_heads != 0) {
    return error("model.num_attention_heads " + std::to_string(num_attention_heads) +
                 " is not a multiple of model.num_key_value_heads " +
                 std::to_string(num_key_value_heads) + "; change one of them");
  }
  if (lightning_nh == 0) lightning_nh = num_attention_heads;
  if (lightning_head_dim == 0) lightning_head_dim = head_dim;
  constexpr int64_t kMaxHeadDim = 1024;  // of the norm and rotation kernels
  for (const int64_t d : {head_dim, lightning_head_dim}) {
    if (d % 2 != 0 || d > kMaxHeadDim) {
      return error("head_dim and lightning_head_dim must be even and at most " +
                   std::to_string(kMaxHeadDim) + ", found " + std::to_string(d));
    }
  }
  if (mixer_types.empty())
    mixer_types.assign(static_cast<size_t>(num_hidden_layers), NameOf(MixerType::kSoftmax));
  if (static_cast<int64_t>(mixer_types.size()) != num_hidden_layers) {
    return error("model.mixer_types has " + std::to_string(mixer_types.size()) + " entries for " +
                 std::to_string(num_hidden_layers) + " layers; give one per layer");
  }
  for (size_t i = 0; i < mixer_types.size(); ++i) {
    std::string& name = mixer_types[i];
    if (name == "lightning" || name == "lightning_attn") name = NameOf(MixerType::kLightning);
    if (name != NameOf(MixerType::kSoftmax) && name != NameOf(MixerType::kLightning)) {
      return error("model.mixer_types[" + std::to_string(i) + "] is '" + name +
                   "'; use minicpm4 or lightning-attn");
    }
  }
  if (const std::string problem = kernels::SparseConfigProblem(sparse); !problem.empty()) {
    return error("model.sparse_config: " + problem);
  }
  return OkStatus();
}

std::string ModelConfig::CudaProblem() const {
  const auto found = [](const std::string& key, int64_t value, const std::string& expected) {
    return "model." + key + " is " + std::to_string(value) + ", the GPU kernels need " + expected;
  };
  const auto head = [](int64_t d) { return d == 16 || d == 32 || d == 64 || d == 128; };
  const std::string head_sizes = "16, 32, 64 or 128";
  if (hidden_size % 8 != 0) return found("hidden_size", hidden_size, "a multiple of 8");
  if (intermediate_size % 8 != 0)
    return found("intermediate_size", intermediate_size, "a multiple of 8");
  constexpr int64_t kWidest = 16384;  // a row of a norm lies in the registers of one block
  if (hidden_size > kWidest)
    return found("hidden_size", hidden_size, "at most " + std::to_string(kWidest));
  if (has_lightning() && use_output_norm && lightning_width() > kWidest)
    return found("lightning_nh * lightning_head_dim", lightning_width(),
                 "at most " + std::to_string(kWidest));
  if (!head(head_dim)) return found("head_dim", head_dim, head_sizes);
  if (has_lightning() && !head(lightning_head_dim))
    return found("lightning_head_dim", lightning_head_dim, head_sizes);
  const int64_t group = num_attention_heads / num_key_value_heads;
  if (group > 16) {
    return found(
        "num_attention_heads", num_attention_heads,
        "at most 16 per key/value head (there are " + std::to_string(num_key_value_heads) + ")");
  }
  if (sparse.block_size % 16 != 0)
    return found("sparse_config.block_size", sparse.block_size, "a multiple of 16");
  return "";
}

std::string ModelConfig::TensorParallelProblem(int64_t ranks) const {
  const auto found = [ranks](const std::string& key, int64_t value, const std::string& expected) {
    return "parallel.tp is " + std::to_string(ranks) + ", but model." + key + " is " +
           std::to_string(value) + ", expected " + expected;
  };
  if (ranks == 1) return "";
  const std::string multiple = "a multiple of parallel.tp";
  if (num_attention_heads % ranks != 0)
    return found("num_attention_heads", num_attention_heads, multiple);
  if (num_key_value_heads % ranks != 0 && ranks % num_key_value_heads != 0) {
    return found("num_key_value_heads", num_key_value_heads,
                 "a multiple of parallel.tp or a divisor of it");
  }
  if (lightning_nh % ranks != 0) return found("lightning_nh", lightning_nh, multiple);
  if (intermediate_size % ranks != 0)
    return found("intermediate_size", intermediate_size, multiple);
  return "";
}

int64_t ModelConfig::VocabularyRows(int64_t ranks) const {
  if (ranks == 1) return vocab_size;
  // Products like rows that come in multiples of 8.
  const int64_t rows = (vocab_size + ranks - 1) / ranks;
  return (rows + 7) / 8 * 8;
}

ModelConfig ModelConfig::Local(const TensorShard& shard) const {
  ModelConfig local = *this;
  local.vocab_size = VocabularyRows(shard.ranks);
  local.num_attention_heads /= shard.ranks;
  local.num_key_value_heads = std::max<int64_t>(1, num_key_value_heads / shard.ranks);
  local.lightning_nh /= shard.ranks;
  local.intermediate_size /= shard.ranks;
  return local;
}

MixerType ModelConfig::mixer(int64_t layer) const {
  return mixer_types[static_cast<size_t>(layer)] == NameOf(MixerType::kLightning)
             ? MixerType::kLightning
             : MixerType::kSoftmax;
}

bool ModelConfig::has_lightning() const {
  return std::find(mixer_types.begin(), mixer_types.end(), NameOf(MixerType::kLightning)) !=
         mixer_types.end();
}

bool ModelConfig::has_softmax() const {
  return std::find(mixer_types.begin(), mixer_types.end(), NameOf(MixerType::kSoftmax)) !=
         mixer_types.end();
}

double ModelConfig::residual_scale() const {
  return scale_depth / std::sqrt(static_cast<double>(num_hidden_layers));
}

}  // namespace sala::model
