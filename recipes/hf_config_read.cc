// Reading of config.json (recipes/hf_config.h).
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <utility>

#include "core/config.h"
#include "core/file.h"
#include "recipes/hf_config.h"
#include "recipes/hf_config_names.h"

namespace sala::recipes {
namespace {

// Reads fields of one JSON object and keeps the first error.
class FieldReader {
 public:
  FieldReader(const nlohmann::json& json, std::string where)
      : json_(json), where_(std::move(where)) {}

  const Status& status() const { return status_; }

  bool Has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }

  // Missing: `fallback` where there is one, else an error.
  void Read(const char* key, int64_t* value, std::optional<int64_t> fallback = std::nullopt) {
    if (!Present(key, fallback.has_value())) {
      if (fallback) *value = *fallback;
    } else if (json_[key].is_number_integer()) {
      *value = json_[key].get<int64_t>();
    } else {
      WrongType(key, "an integer");
    }
  }

  void Read(const char* key, double* value, std::optional<double> fallback = std::nullopt) {
    if (!Present(key, fallback.has_value())) {
      if (fallback) *value = *fallback;
    } else if (json_[key].is_number()) {
      *value = json_[key].get<double>();
    } else {
      WrongType(key, "a number");
    }
  }

  void Read(const char* key, bool* value, std::optional<bool> fallback = std::nullopt) {
    if (!Present(key, fallback.has_value())) {
      if (fallback) *value = *fallback;
    } else if (json_[key].is_boolean()) {
      *value = json_[key].get<bool>();
    } else {
      WrongType(key, "true or false");
    }
  }

  void Read(const char* key, std::string* value,
            std::optional<std::string> fallback = std::nullopt) {
    if (!Present(key, fallback.has_value())) {
      if (fallback) *value = *fallback;
    } else if (json_[key].is_string()) {
      *value = json_[key].get<std::string>();
    } else {
      WrongType(key, "a string");
    }
  }

  void Read(const char* key, std::vector<std::string>* value) {
    if (!Present(key, false)) return;
    const nlohmann::json& list = json_[key];
    value->clear();
    for (const nlohmann::json& item : list) {
      if (!item.is_string()) return WrongType(key, "a list of strings");
      value->push_back(item.get<std::string>());
    }
    if (!list.is_array()) WrongType(key, "a list of strings");
  }

  // An id, or the first of a list of ids, all below `vocab_size` (0: any).
  void ReadId(const char* key, int64_t* value, std::optional<int64_t> fallback,
              int64_t vocab_size) {
    if (!Present(key, fallback.has_value())) {
      if (fallback) *value = *fallback;
      return;
    }
    const nlohmann::json ids =
        json_[key].is_array() ? json_[key] : nlohmann::json::array({json_[key]});
    for (const nlohmann::json& one : ids) {
      if (vocab_size > 0 && one.is_number_integer() && one.get<int64_t>() >= vocab_size) {
        return Fail("IMP-FIELD", std::string("field ") + key + " is " +
                                     Printable(json_[key].dump()) +
                                     ", expected ids below vocab_size " +
                                     std::to_string(vocab_size) + "; correct the file");
      }
    }
    const nlohmann::json& id =
        json_[key].is_array() && !json_[key].empty() ? json_[key][0] : json_[key];
    if (id.is_number_integer() && id.get<int64_t>() >= 0) {
      *value = id.get<int64_t>();
    } else {
      WrongType(key, "a token id or a list of them");
    }
  }

  void Fail(const std::string& code, const std::string& text) {
    if (status_.ok()) status_ = MakeError(ExitCode::kData, code, where_ + ": " + text);
  }

  // Takes over the error of a reader of a nested object.
  void Adopt(const Status& status) {
    if (status_.ok()) status_ = status;
  }

  const nlohmann::json& json() const { return json_; }

 private:
  bool Present(const char* key, bool optional) {
    if (Has(key)) return true;
    if (!optional)
      Fail("IMP-FIELD", std::string("field ") + key + " is missing; add it to the file");
    return false;
  }

  void WrongType(const char* key, const char* expected) {
    Fail("IMP-FIELD", std::string("field ") + key + " is " + Printable(json_[key].dump()) +
                          ", expected " + expected + "; correct the file");
  }

  const nlohmann::json& json_;
  std::string where_;
  Status status_;
};

bool Mentions(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// Why a model_type is none of those that are read.
std::string WhyNot(const std::string& type) {
  if (Mentions(type, "moe") || Mentions(type, "mixtral") || Mentions(type, "dbrx"))
    return "mixtures of experts are not supported";
  if (type == "minicpm3" || Mentions(type, "deepseek")) return "latent attention is not supported";
  return "expected minicpm_sala, minicpm, llama or qwen3";
}

// Features that change what the model computes and that it does not have.
void RefuseUnsupported(FieldReader& in) {
  const nlohmann::json& json = in.json();
  const auto refuse = [&](const char* key, const std::string& why) {
    in.Fail("IMP-ARCH", std::string(key) + " is " + Printable(json[key].dump()) + "; " + why);
  };
  for (const char* key : {"quantization_config", "compression_config"}) {
    if (in.Has(key)) {
      in.Fail("IMP-QUANT",
              std::string("the weights are quantised (") + key + "); take the unquantised model");
    }
  }
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (in.Has(key) && json[key] != false) {
      in.Fail("IMP-BIAS", std::string(key) + " is on; layers with biases are not supported");
    }
  }
  for (const char* key :
       {"num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"}) {
    if (in.Has(key) && json[key].is_number() && json[key].get<double>() > 1)
      refuse(key, "mixtures of experts are not supported");
  }
  for (const char* key : {"q_lora_rank", "kv_lora_rank"}) {
    if (in.Has(key)) refuse(key, "latent attention is not supported");
  }
  const std::string full_only = "only full attention is supported";
  if (in.Has("use_sliding_window") && json["use_sliding_window"] != false)
    refuse("use_sliding_window", full_only);
  // Beside use_sliding_window: false a window is a number that nothing uses.
  if (in.Has("sliding_window") && !in.Has("use_sliding_window"))
    refuse("sliding_window", full_only);
  if (in.Has("layer_types")) {
    for (const nlohmann::json& type : json["layer_types"]) {
      if (type != "full_attention") return refuse("layer_types", full_only);
    }
  }
  if (in.Has("hidden_act") && json["hidden_act"] != "silu")
    refuse("hidden_act", "only silu is supported");
  if (in.Has("partial_rotary_factor") && json["partial_rotary_factor"] != 1.0) {
    refuse("partial_rotary_factor", "only a rotation of the whole head is supported");
  }
  if (in.Has("attention_dropout") && json["attention_dropout"] != 0.0)
    refuse("attention_dropout", "dropout is not supported");
  if (in.Has("rope_scaling")) {
    const nlohmann::json& scaling = json["rope_scaling"];
    const nlohmann::json type =
        scaling.is_object() ? scaling.value("rope_type", scaling.value("type", nlohmann::json()))
                            : scaling;
    if (type != "default")
      refuse("rope_scaling",
             "rotary scaling is not supported; take the model before its long-context extension");
  }
}

void ReadShapes(FieldReader& in, const std::string& type, model::ModelConfig* c) {
  in.Read("vocab_size", &c->vocab_size);
  in.Read("hidden_size", &c->hidden_size);
  in.Read("intermediate_size", &c->intermediate_size);
  in.Read("num_hidden_layers", &c->num_hidden_layers);
  in.Read("num_attention_heads", &c->num_attention_heads);
  const bool sala = type == kSala;
  // The other architectures define these by their defaults when the file is silent.
  in.Read("num_key_value_heads", &c->num_key_value_heads,
          sala ? std::nullopt : std::optional<int64_t>(c->num_attention_heads));
  std::optional<int64_t> head_dim;
  if (type == kLlama || type == kMiniCpm)
    head_dim = c->num_attention_heads > 0 ? c->hidden_size / c->num_attention_heads : 0;
  in.Read("head_dim", &c->head_dim, head_dim);
  in.Read("max_position_embeddings", &c->max_position_embeddings);
  in.Read("rms_norm_eps", &c->rms_norm_eps);
  in.Read("tie_word_embeddings", &c->tie_word_embeddings,
          sala ? std::nullopt : std::optional<bool>(type == kMiniCpm));
  in.Read("initializer_range", &c->initializer_range,
          sala ? std::nullopt : std::optional<double>(0.02));
  const auto limit = [&in](const char* key, int64_t n, int64_t most) {
    if (n >= 1 && n <= most) return;
    in.Fail("IMP-FIELD", std::string("field ") + key + " is " + std::to_string(n) +
                             ", expected 1 to " + std::to_string(most) + "; correct the file");
  };
  for (const auto& [key, n] : std::initializer_list<std::pair<const char*, int64_t>>{
           {"vocab_size", c->vocab_size},
           {"hidden_size", c->hidden_size},
           {"intermediate_size", c->intermediate_size},
           {"num_attention_heads", c->num_attention_heads},
           {"num_key_value_heads", c->num_key_value_heads},
           {"head_dim", c->head_dim},
           {"max_position_embeddings", c->max_position_embeddings}}) {
    limit(key, n, int64_t{1} << 31);
  }
  limit("num_hidden_layers", c->num_hidden_layers, 100000);
}

void ReadRope(FieldReader& in, const std::string& type, const std::string& path,
              model::ModelConfig* c) {
  if (!in.Has("rope_parameters")) {
    return in.Read("rope_theta", &c->rope_theta,
                   type == kSala ? std::nullopt : std::optional<double>(10000.0));
  }
  // Newer files keep the rotary numbers in one object.
  const nlohmann::json& rope = in.json()["rope_parameters"];
  if (!rope.is_object())
    return in.Fail("IMP-FIELD", "rope_parameters is " + Printable(rope.dump()) +
                                    ", expected an object; correct the file");
  FieldReader inner(rope, path + ": rope_parameters");
  std::string rope_type;
  inner.Read("rope_type", &rope_type, "default");
  inner.Read("rope_theta", &c->rope_theta);
  if (rope_type != "default")
    inner.Fail("IMP-ARCH",
               "rope_type is '" + Printable(rope_type) + "'; rotary scaling is not supported");
  in.Adopt(inner.status());
  if (inner.status().ok() && in.Has("rope_theta") &&
      in.json()["rope_theta"] != rope["rope_theta"]) {
    in.Fail("IMP-FIELD", "rope_theta is " + Printable(in.json()["rope_theta"].dump()) +
                             ", in rope_parameters it is " + Printable(rope["rope_theta"].dump()) +
                             "; make them agree");
  }
}

void ReadScales(FieldReader& in, const std::string& type, model::ModelConfig* c) {
  if (type == kSala || type == kMiniCpm) {
    in.Read("scale_emb", &c->scale_emb);
    in.Read("scale_depth", &c->scale_depth);
    in.Read("dim_model_base", &c->dim_model_base);
    if (c->dim_model_base < 1)
      in.Fail("IMP-FIELD", "dim_model_base is " + std::to_string(c->dim_model_base) +
                               ", expected at least 1; correct the file");
    return;
  }
  // No muP: factors that change nothing, so that there is one code path.
  c->scale_emb = 1;
  c->scale_depth = std::sqrt(static_cast<double>(c->num_hidden_layers));
  c->dim_model_base = static_cast<double>(c->hidden_size);
}

void ReadTokenIds(FieldReader& in, const std::string& type, model::ModelConfig* c) {
  std::optional<int64_t> fallback;
  if (type != kSala) fallback = 2;
  in.ReadId("eos_token_id", &c->eos_token_id, fallback, c->vocab_size);
  // Some vocabularies have no start or padding token; nothing the model computes depends on them.
  in.ReadId("bos_token_id", &c->bos_token_id,
            type == kSala ? std::nullopt : std::optional<int64_t>(c->eos_token_id), c->vocab_size);
  // Older files name a padding token behind the vocabulary; padding reaches no model here.
  in.ReadId("pad_token_id", &c->pad_token_id, c->eos_token_id, /*vocab_size=*/0);
}

void ReadSparse(FieldReader& in, model::ModelConfig* c, const std::string& path) {
  if (!in.Has("sparse_config") || !in.json()["sparse_config"].is_object()) {
    return in.Fail("IMP-FIELD",
                   "field sparse_config is missing or not an object; correct the file");
  }
  FieldReader sparse(in.json()["sparse_config"], path + ": sparse_config");
  sparse.Read("kernel_size", &c->sparse.kernel_size);
  sparse.Read("kernel_stride", &c->sparse.kernel_stride);
  sparse.Read("init_blocks", &c->sparse.init_blocks);
  sparse.Read("block_size", &c->sparse.block_size);
  sparse.Read("window_size", &c->sparse.window_size);
  sparse.Read("topk", &c->sparse.topk);
  sparse.Read("dense_len", &c->sparse.dense_len);
  bool use_nope = false;
  sparse.Read("use_nope", &use_nope, false);
  if (use_nope) sparse.Fail("IMP-ARCH", "use_nope is true; only false is supported");
  in.Adopt(sparse.status());
}

void ReadHybrid(FieldReader& in, const std::string& path, model::ModelConfig* c) {
  in.Read("attn_use_rope", &c->attn_use_rope);
  in.Read("attn_use_output_gate", &c->attn_use_output_gate);
  in.Read("lightning_nh", &c->lightning_nh);
  in.Read("lightning_head_dim", &c->lightning_head_dim);
  in.Read("lightning_use_rope", &c->lightning_use_rope);
  in.Read("qk_norm", &c->qk_norm);
  in.Read("use_output_norm", &c->use_output_norm);
  in.Read("use_output_gate", &c->use_output_gate);
  in.Read("mixer_types", &c->mixer_types);
  int64_t key_value_heads = 0;
  in.Read("lightning_nkv", &key_value_heads);
  if (key_value_heads != c->lightning_nh) {
    in.Fail("IMP-ARCH", "lightning_nkv is " + std::to_string(key_value_heads) +
                            " and lightning_nh is " + std::to_string(c->lightning_nh) +
                            "; linear layers need as many key/value heads as query heads");
  }
  std::string scale;
  in.Read("lightning_scale", &scale);
  if (scale != kLightningScale)
    in.Fail("IMP-ARCH",
            "lightning_scale is '" + Printable(scale) + "'; only 1/sqrt(d) is supported");
  ReadSparse(in, c, path);
}

// The limits that the configuration language has for the keys of a model: a checkpoint's model.yaml
// is read with them.
Status CheckRanges(const model::ModelConfig& config) {
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document,
                        ConfigDocument::Parse(EmitConfig(config), "as a model"));
  model::ModelConfig again;
  return BindConfig(document, &again);
}

}  // namespace

StatusOr<model::ModelConfig> ModelConfigFromHf(const nlohmann::json& json,
                                               const std::string& path) {
  if (!json.is_object())
    return MakeError(ExitCode::kData, "IMP-FIELD",
                     path + ": not a JSON object; fetch the file again");
  FieldReader in(json, path);
  std::string type;
  in.Read("model_type", &type);
  SALA_RETURN_IF_ERROR(in.status());
  if (type != kSala && type != kMiniCpm && type != kLlama && type != kQwen3) {
    return MakeError(ExitCode::kData, "IMP-ARCH",
                     path + ": model_type is '" + Printable(type) + "'; " + WhyNot(type));
  }
  RefuseUnsupported(in);
  if (type != kSala && in.Has("sparse_config")) {
    in.Fail("IMP-ARCH",
            "sparse_config is set, but sparse attention is read of minicpm_sala only; "
            "remove the field to take the model with full attention");
  }
  model::ModelConfig config;
  ReadShapes(in, type, &config);
  ReadRope(in, type, path, &config);
  ReadScales(in, type, &config);
  ReadTokenIds(in, type, &config);
  config.attn_use_rope = true;
  config.attn_qk_norm = type == kQwen3;
  config.attn_use_output_gate = false;
  if (type == kSala) ReadHybrid(in, path, &config);
  SALA_RETURN_IF_ERROR(in.status());
  Status usable = config.Resolve();
  if (usable.ok()) usable = CheckRanges(config);
  if (usable.ok()) return config;
  const std::string text = MessageOf(usable);  // a line for each key
  return MakeError(ExitCode::kData, "IMP-FIELD", path + ": " + text.substr(0, text.find('\n')));
}

}  // namespace sala::recipes
