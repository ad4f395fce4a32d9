#include "recipes/hf_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "model/parameters.h"
#include "tests/recipes/export/released_config.h"

namespace sala::recipes {
namespace {

using testing::HasSubstr;

nlohmann::json Llama() {
  return {{"model_type", "llama"},  {"vocab_size", 320},
          {"hidden_size", 64},      {"intermediate_size", 128},
          {"num_hidden_layers", 4}, {"num_attention_heads", 4},
          {"rms_norm_eps", 1e-5},   {"max_position_embeddings", 2048},
          {"eos_token_id", {7, 9}}};
}

void ExpectError(const nlohmann::json& json, const std::string& code, const std::string& text) {
  const auto config = ModelConfigFromHf(json, "somewhere/config.json");
  ASSERT_FALSE(config.ok()) << json.dump();
  EXPECT_EQ(ErrorCodeOf(config.status()), code) << MessageOf(config.status());
  EXPECT_EQ(ExitCodeOf(config.status()), ExitCode::kData);
  EXPECT_THAT(MessageOf(config.status()), HasSubstr(text));
  EXPECT_THAT(MessageOf(config.status()), HasSubstr("somewhere/config.json"));
}

TEST(HfConfigTest, TheReleasedConfigurationIsUnderstoodAndWrittenBack) {
  const nlohmann::json released = ReleasedConfig();
  const auto config = ModelConfigFromHf(released, "config.json");
  ASSERT_TRUE(config.ok()) << MessageOf(config.status());
  EXPECT_EQ(config->hidden_size, 4096);
  EXPECT_EQ(config->num_key_value_heads, 2);
  EXPECT_EQ(config->eos_token_id, 2);
  EXPECT_EQ(config->mixer(0), model::MixerType::kSoftmax);
  EXPECT_EQ(config->mixer(1), model::MixerType::kLightning);
  EXPECT_FALSE(config->attn_use_rope);
  EXPECT_TRUE(config->attn_use_output_gate);
  EXPECT_EQ(config->width_multiplier(), 16.0);

  const auto written = HfConfig(*config, {.eos_token_ids = {2, 73440}});
  ASSERT_TRUE(written.ok());
  for (const auto& [key, value] : released.items()) {
    ASSERT_TRUE(written->contains(key)) << key;
    EXPECT_EQ((*written)[key], value) << key;
  }
  // The one field more: the older spelling of "dtype".
  EXPECT_EQ(written->size(), released.size() + 1);
  EXPECT_EQ((*written)["torch_dtype"], "bfloat16");
  // Derived fields crash an engine.
  EXPECT_FALSE(written->contains("has_sparse_attention"));
}

TEST(HfConfigTest, TheReleasedModelHas395TensorsOfTheKnownShapes) {
  const nlohmann::json facts = ReleasedFacts();
  EXPECT_EQ(facts["tensor_count"], 395);
  EXPECT_EQ(facts["parameters"], 9477203968);
  EXPECT_EQ(facts["total_size"], 18954407936);
  const auto config = ModelConfigFromHf(ReleasedConfig(), "config.json");
  ASSERT_TRUE(config.ok());
  const std::vector<model::ParameterSpec> specs = model::ParameterSpecs(*config);
  EXPECT_EQ(specs.size(), 395U);
  int64_t parameters = 0;
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const model::ParameterSpec& spec : specs) {
    parameters += spec.numel;
    EXPECT_TRUE(shapes.emplace(spec.name, spec.shape).second) << spec.name << " twice";
  }
  EXPECT_EQ(parameters, 9477203968);
  EXPECT_EQ(shapes, ReleasedShapes());
}

TEST(HfConfigTest, EveryFieldOfAHybridIsRequired) {
  const nlohmann::json released = ReleasedConfig();
  // What other engines read and this model computes the same way without, or has a sound default
  // for.
  const std::set<std::string> optional = {"architectures",   "dtype",          "hidden_act",
                                          "rope_scaling",    "attention_bias", "attention_dropout",
                                          "mup_denominator", "pretraining_tp", "use_cache",
                                          "shift_labels",    "pad_token_id"};
  for (const auto& [key, value] : released.items()) {
    nlohmann::json json = released;
    json.erase(key);
    if (optional.count(key) > 0) {
      EXPECT_TRUE(ModelConfigFromHf(json, "config.json").ok()) << key;
    } else {
      ExpectError(json, "IMP-FIELD", key);
    }
  }
  for (const auto& [key, value] : released["sparse_config"].items()) {
    if (key == "use_nope") continue;
    nlohmann::json json = released;
    json["sparse_config"].erase(key);
    ExpectError(json, "IMP-FIELD", key);
  }
}

TEST(HfConfigTest, FieldsOfTheWrongTypeAreNamed) {
  nlohmann::json json = ReleasedConfig();
  json["hidden_size"] = "4096";
  ExpectError(json, "IMP-FIELD", "hidden_size is \"4096\", expected an integer");
  json = ReleasedConfig();
  json["mixer_types"] = {1, 2};
  ExpectError(json, "IMP-FIELD", "mixer_types");
  json = ReleasedConfig();
  json["mixer_types"].erase(0);
  ExpectError(json, "IMP-FIELD", "31 entries");
  json = ReleasedConfig();
  json["num_hidden_layers"] = -1;
  ExpectError(json, "IMP-FIELD", "-1");
  json = ReleasedConfig();
  json["hidden_size"] = int64_t{1} << 62;
  ExpectError(json, "IMP-FIELD", "4611686018427387904");
  ExpectError(nlohmann::json::array(), "IMP-FIELD", "not a JSON object");
}

TEST(HfConfigTest, NumbersThatNoModelHasAreRefused) {
  for (const auto& [key, value] : std::map<std::string, double>{
           {"rope_theta", 0}, {"rope_theta", -1e4}, {"rms_norm_eps", -1}}) {
    nlohmann::json json = Llama();
    json[key] = value;
    ExpectError(json, "IMP-FIELD", "`" + key + "`: found ");
  }
}

TEST(HfConfigTest, WhatTheModelCannotComputeIsRefused) {
  const auto with = [](const char* key, const nlohmann::json& value) {
    nlohmann::json json = ReleasedConfig();
    json[key] = value;
    return json;
  };
  ExpectError(with("model_type", "mixtral"), "IMP-ARCH", "mixtral");
  ExpectError(with("hidden_act", "gelu"), "IMP-ARCH", "gelu");
  ExpectError(with("rope_scaling", {{"rope_type", "longrope"}}), "IMP-ARCH", "longrope");
  ExpectError(with("num_experts", 8), "IMP-ARCH", "num_experts");
  ExpectError(with("use_sliding_window", true), "IMP-ARCH", "sliding");
  ExpectError(with("sliding_window", 4096), "IMP-ARCH", "sliding_window is 4096");
  ExpectError(with("layer_types", {"full_attention", "sliding_attention"}), "IMP-ARCH",
              "layer_types");
  ExpectError(with("kv_lora_rank", 512), "IMP-ARCH", "latent attention");
  ExpectError(with("mlp_bias", true), "IMP-BIAS", "mlp_bias");
  ExpectError(with("compression_config", {{"bits", 4}}), "IMP-QUANT", "compression_config");
  for (const char* moe : {"mixtral", "qwen3_moe", "qwen2_moe", "granitemoe", "dbrx"})
    ExpectError(with("model_type", moe), "IMP-ARCH", "mixtures of experts");
  for (const char* mla : {"minicpm3", "deepseek_v2", "deepseek_v3"})
    ExpectError(with("model_type", mla), "IMP-ARCH", "latent attention");
  ExpectError(with("model_type", "gpt2"), "IMP-ARCH",
              "gpt2'; expected minicpm_sala, minicpm, llama or qwen3");
  ExpectError(with("lightning_nkv", 2), "IMP-ARCH", "lightning_nkv is 2");
  ExpectError(with("lightning_scale", "1"), "IMP-ARCH", "lightning_scale");
  ExpectError(with("attention_bias", true), "IMP-BIAS", "attention_bias");
  ExpectError(with("quantization_config", {{"bits", 4}}), "IMP-QUANT", "quantised");
  nlohmann::json sparse = Llama();
  sparse["sparse_config"] = ReleasedConfig()["sparse_config"];
  ExpectError(sparse, "IMP-ARCH", "sparse_config");
  nlohmann::json nope = ReleasedConfig();
  nope["sparse_config"]["use_nope"] = true;
  ExpectError(nope, "IMP-ARCH", "use_nope");
}

TEST(HfConfigTest, ModelsWithoutScaleFactorsGetOnesThatChangeNothing) {
  const auto config = ModelConfigFromHf(Llama(), "config.json");
  ASSERT_TRUE(config.ok()) << MessageOf(config.status());
  EXPECT_EQ(config->scale_emb, 1.0);
  EXPECT_EQ(config->residual_scale(), 1.0);
  EXPECT_EQ(config->width_multiplier(), 1.0);
  EXPECT_EQ(config->num_key_value_heads,
            4);  // llama: as many as query heads where the file is silent
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->eos_token_id, 7);
  EXPECT_TRUE(config->attn_use_rope);
  EXPECT_FALSE(config->attn_qk_norm);
  EXPECT_FALSE(config->has_lightning());
}

TEST(HfConfigTest, Qwen3HasQueryAndKeyNorms) {
  nlohmann::json json = Llama();
  json["model_type"] = "qwen3";
  ExpectError(json, "IMP-FIELD", "head_dim");
  json["head_dim"] = 32;
  auto config = ModelConfigFromHf(json, "config.json");
  ASSERT_TRUE(config.ok());
  EXPECT_TRUE(config->attn_qk_norm);
  // With muP factors it is no qwen3 any more, and no other format has the norms.
  config->scale_emb = 12;
  const auto written = HfConfig(*config);
  ASSERT_FALSE(written.ok());
  EXPECT_EQ(ErrorCodeOf(written.status()), "EXP-QKNORM");
}

TEST(HfConfigTest, RotaryNumbersInTheNewerPlaceAreRead) {
  nlohmann::json json = Llama();
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5e5}};
  auto config = ModelConfigFromHf(json, "config.json");
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->rope_theta, 5e5);
  json["rope_theta"] = 5e5;  // in both places, alike
  EXPECT_TRUE(ModelConfigFromHf(json, "config.json").ok());
  json["rope_theta"] = 1e4;
  ExpectError(json, "IMP-FIELD", "in rope_parameters it is 500000.0");
  json.erase("rope_theta");
  json["rope_parameters"]["rope_type"] = "yarn";
  ExpectError(json, "IMP-ARCH", "yarn");
  json["rope_parameters"] = 5e5;
  ExpectError(json, "IMP-FIELD", "rope_parameters");
  json["rope_parameters"] = nlohmann::json::object();
  json["rope_theta"] = 1e4;
  ExpectError(json, "IMP-FIELD", "rope_parameters: field rope_theta is missing");
  json.erase("rope_theta");
  json.erase("rope_parameters");
  EXPECT_EQ(ModelConfigFromHf(json, "config.json")->rope_theta, 1e4) << "llama's default";
  json["rope_theta"] = 2e6;
  EXPECT_EQ(ModelConfigFromHf(json, "config.json")->rope_theta, 2e6) << "the older place";
}

TEST(HfConfigTest, AFullAttentionModelIsWrittenAsWhatItIs) {
  nlohmann::json qwen3 = Llama();
  qwen3["model_type"] = "qwen3";
  qwen3["head_dim"] = 32;
  nlohmann::json minicpm = Llama();
  minicpm["model_type"] = "minicpm";
  minicpm["scale_emb"] = 12;
  minicpm["scale_depth"] = 1.4;
  minicpm["dim_model_base"] = 256;
  const std::map<std::string, std::string> architectures = {{"llama", "LlamaForCausalLM"},
                                                            {"qwen3", "Qwen3ForCausalLM"},
                                                            {"minicpm", "MiniCPMForCausalLM"}};
  for (const nlohmann::json& json : {Llama(), qwen3, minicpm}) {
    const std::string type = json["model_type"];
    SCOPED_TRACE(type);
    const auto config = ModelConfigFromHf(json, "config.json");
    ASSERT_TRUE(config.ok());
    const auto written = HfConfig(*config, {.dtype = WeightType::kF16, .eos_token_ids = {}});
    ASSERT_TRUE(written.ok());
    EXPECT_EQ((*written)["model_type"], type);
    EXPECT_EQ((*written)["architectures"], nlohmann::json::array({architectures.at(type)}));
    EXPECT_EQ((*written)["torch_dtype"], "float16");
    EXPECT_EQ(written->contains("scale_emb"), type == "minicpm");
    // Its presence would switch selection on in readers.
    EXPECT_FALSE(written->contains("sparse_config"));
    const auto back = ModelConfigFromHf(*written, "config.json");
    ASSERT_TRUE(back.ok());
    EXPECT_EQ(EmitConfig(*back), EmitConfig(*config));
  }
}

TEST(HfConfigTest, AHybridComesBackFieldByField) {
  const auto config = ModelConfigFromHf(ReleasedConfig(), "config.json");
  ASSERT_TRUE(config.ok());
  model::ModelConfig odd = *config;
  odd.attn_use_rope = true;
  odd.scale_emb = 0.1 + 0.2;  // no short decimal
  odd.scale_depth = std::sqrt(2.0);
  odd.rms_norm_eps = 1e-5;
  odd.rope_theta = 12345.678;
  odd.qk_norm = false;
  odd.use_output_gate = false;
  odd.sparse.topk = 30;
  odd.sparse.dense_len = 256;
  const auto written = HfConfig(odd);
  ASSERT_TRUE(written.ok());
  const auto back = ModelConfigFromHf(nlohmann::json::parse(written->dump()), "config.json");
  ASSERT_TRUE(back.ok()) << MessageOf(back.status());
  EXPECT_EQ(EmitConfig(*back), EmitConfig(odd));
}

}  // namespace
}  // namespace sala::recipes
