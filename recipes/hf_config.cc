// Names of number types and writing of config.json.
#include "recipes/hf_config.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <optional>

#include "recipes/hf_config_names.h"

namespace sala::recipes {
namespace {

struct WeightTypeNames {
  WeightType type;
  const char *name, *format, *config;
};
constexpr WeightTypeNames kWeightTypes[] = {{WeightType::kBF16, "bf16", "BF16", "bfloat16"},
                                            {WeightType::kF16, "f16", "F16", "float16"},
                                            {WeightType::kF32, "f32", "F32", "float32"},
                                            {WeightType::kF64, "f64", "F64", "float64"}};

const WeightTypeNames& NamesOf(WeightType type) {
  return *std::find_if(std::begin(kWeightTypes), std::end(kWeightTypes),
                       [&](const WeightTypeNames& names) { return names.type == type; });
}

// Factors that change nothing, as ReadScales gives them to models without muP.
bool HasMuP(const model::ModelConfig& config) {
  return config.scale_emb != 1 ||
         config.scale_depth != std::sqrt(static_cast<double>(config.num_hidden_layers)) ||
         config.dim_model_base != static_cast<double>(config.hidden_size);
}

// The architecture that computes what the model computes.
std::string TypeOf(const model::ModelConfig& config) {
  if (config.has_lightning() || !config.attn_use_rope || config.attn_use_output_gate) return kSala;
  if (HasMuP(config)) return kMiniCpm;
  return config.attn_qk_norm ? kQwen3 : kLlama;
}

const char* ArchitectureOf(const std::string& type) {
  if (type == kSala) return "MiniCPMSALAForCausalLM";
  if (type == kMiniCpm) return "MiniCPMForCausalLM";
  return type == kQwen3 ? "Qwen3ForCausalLM" : "LlamaForCausalLM";
}

// A JSON integer where the number is whole: the released files write scale_emb as 12, not 12.0.
nlohmann::json Number(double value) {
  constexpr double kExactIntegers = 9007199254740992.0;  // 2^53
  if (value == std::floor(value) && std::fabs(value) < kExactIntegers)
    return static_cast<int64_t>(value);
  return value;
}

std::vector<int64_t> EosIds(const model::ModelConfig& config, const HfConfigOptions& options) {
  return options.eos_token_ids.empty() ? std::vector<int64_t>{config.eos_token_id}
                                       : options.eos_token_ids;
}

// One id is written as a number, several as a list: the two spellings readers know.
nlohmann::json EosJson(const model::ModelConfig& config, const HfConfigOptions& options) {
  const std::vector<int64_t> ids = EosIds(config, options);
  if (ids.size() == 1) return ids[0];
  return ids;
}

nlohmann::json SparseJson(const model::SparseConfig& sparse) {
  return {{"kernel_size", sparse.kernel_size}, {"kernel_stride", sparse.kernel_stride},
          {"init_blocks", sparse.init_blocks}, {"block_size", sparse.block_size},
          {"window_size", sparse.window_size}, {"topk", sparse.topk},
          {"dense_len", sparse.dense_len},     {"use_nope", false}};
}

}  // namespace

std::string_view NameOf(WeightType type) { return NamesOf(type).name; }

std::optional<WeightType> ParseWeightType(std::string_view name) {
  for (const WeightTypeNames& names : kWeightTypes) {
    if (name == names.name) return names.type;
  }
  return std::nullopt;
}

std::optional<WeightType> WeightTypeOfFormat(std::string_view name) {
  for (const WeightTypeNames& names : kWeightTypes) {
    if (name == names.format) return names.type;
  }
  return std::nullopt;
}

StatusOr<nlohmann::json> HfConfig(const model::ModelConfig& config,
                                  const HfConfigOptions& options) {
  const std::string type = TypeOf(config);
  if (config.attn_qk_norm && type != kQwen3) {
    return MakeError(ExitCode::kData, "EXP-QKNORM",
                     "attn_qk_norm is true: the exported format (" + type +
                         ") has no query/key norm in softmax layers; convert with "
                         "halo.softmax_qk_norm: fold, or train with attn_qk_norm: false");
  }
  const char* dtype = NamesOf(options.dtype).config;
  nlohmann::json out = {
      {"architectures", nlohmann::json::array({ArchitectureOf(type)})},
      {"model_type", type},
      {"torch_dtype", dtype},  // read by engines; newer libraries read "dtype"
      {"dtype", dtype},
      {"vocab_size", config.vocab_size},
      {"hidden_size", config.hidden_size},
      {"intermediate_size", config.intermediate_size},
      {"num_hidden_layers", config.num_hidden_layers},
      {"num_attention_heads", config.num_attention_heads},
      {"num_key_value_heads", config.num_key_value_heads},
      {"head_dim", config.head_dim},
      {"hidden_act", "silu"},
      {"rms_norm_eps", config.rms_norm_eps},
      {"max_position_embeddings", config.max_position_embeddings},
      {"rope_theta", config.rope_theta},
      {"rope_scaling", nullptr},
      {"attention_bias", false},
      {"attention_dropout", 0.0},
      {"initializer_range", config.initializer_range},
      {"tie_word_embeddings", config.tie_word_embeddings},
      {"use_cache", true},
      {"bos_token_id", config.bos_token_id},
      {"eos_token_id", EosJson(config, options)},
      {"pad_token_id", config.pad_token_id},
  };
  if (type != kQwen3) out["pretraining_tp"] = 1;
  if (type == kLlama) out["mlp_bias"] = false;
  if (type == kQwen3) out["use_sliding_window"] = false;
  if (type == kLlama || type == kQwen3) return out;
  out["scale_emb"] = Number(config.scale_emb);
  out["scale_depth"] = config.scale_depth;
  out["dim_model_base"] = Number(config.dim_model_base);
  if (type == kMiniCpm) return out;
  out["mup_denominator"] = config.num_hidden_layers;  // never read by the model code; the released
                                                      // file has the layer count
  out["shift_labels"] = true;
  out["mixer_types"] = config.mixer_types;
  out["attn_use_rope"] = config.attn_use_rope;
  out["attn_use_output_gate"] = config.attn_use_output_gate;
  out["lightning_nh"] = config.lightning_nh;
  out["lightning_nkv"] = config.lightning_nh;
  out["lightning_head_dim"] = config.lightning_head_dim;
  out["lightning_scale"] = kLightningScale;
  out["lightning_use_rope"] = config.lightning_use_rope;
  out["qk_norm"] = config.qk_norm;
  out["use_output_norm"] = config.use_output_norm;
  out["use_output_gate"] = config.use_output_gate;
  out["sparse_config"] = SparseJson(config.sparse);
  return out;
}

nlohmann::json HfGenerationConfig(const model::ModelConfig& config,
                                  const HfConfigOptions& options) {
  return {{"do_sample", true},
          {"bos_token_id", config.bos_token_id},
          {"eos_token_id", EosJson(config, options)},
          {"pad_token_id", config.pad_token_id}};
}

}  // namespace sala::recipes
