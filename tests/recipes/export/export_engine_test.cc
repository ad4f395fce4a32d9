#include "recipes/export_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "core/file.h"
#include "recipes/export_base.h"
#include "recipes/export_stops.h"
#include "tests/core/temp_dir.h"

namespace sala::recipes {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

json Hybrid() {
  return {{"model_type", "minicpm_sala"},
          {"torch_dtype", "bfloat16"},
          {"num_attention_heads", 4},
          {"head_dim", 8},
          {"lightning_nh", 4},
          {"lightning_head_dim", 8},
          {"mixer_types", {"minicpm4", "lightning-attn"}},
          {"auto_map",
           {{"AutoConfig", "configuration_minicpm_sala.C"},
            {"AutoModelForCausalLM", "modeling_minicpm_sala.X"}}}};
}

TEST(ExportEngine, SaysWhichFieldAnEngineCannotLoad) {
  const json llama = {{"model_type", "llama"}, {"torch_dtype", "bfloat16"}};
  for (const Engine engine : {Engine::kHf, Engine::kSglang, Engine::kVllm})
    EXPECT_TRUE(CheckEngineConfig(engine, llama, {}).ok());
  const std::vector<std::string> code = {"configuration_minicpm_sala.py",
                                         "modeling_minicpm_sala.py"};
  EXPECT_TRUE(CheckEngineConfig(Engine::kHf, Hybrid(), code).ok());
  json own = Hybrid();
  own["auto_map"].erase("AutoConfig");
  EXPECT_TRUE(CheckEngineConfig(Engine::kSglang, own, {}).ok());
  json minicpm = {{"model_type", "minicpm"},
                  {"auto_map", {{"AutoConfig", "c.C"}, {"AutoModelForCausalLM", "m.M"}}}};
  for (const Engine engine : {Engine::kHf, Engine::kSglang, Engine::kVllm})
    EXPECT_TRUE(CheckEngineConfig(engine, minicpm, {"c.py", "m.py"}).ok());
  EXPECT_TRUE(CheckEngineConfig(Engine::kSglang, minicpm, {"c.py"}).ok());
  minicpm["auto_map"]["AutoTokenizer"] = {"t.T", nullptr};
  json elsewhere = minicpm;
  elsewhere["auto_map"] = {{"AutoConfig", "me/it--c.C"}, {"AutoModelForCausalLM", "me/it--m.M"}};
  EXPECT_TRUE(CheckEngineConfig(Engine::kHf, elsewhere, {}).ok());

  const auto with = [](const char* key, const json& value) {
    json config = Hybrid();
    config[key] = value;
    return config;
  };
  json no_map = Hybrid();
  no_map.erase("auto_map");
  struct Case {
    Engine engine;
    json config;
    std::vector<std::string> files;
    const char* text;
  };
  for (const Case& bad : std::vector<Case>{
           {Engine::kVllm, Hybrid(), code, "model_type: found minicpm_sala, which vLLM"},
           {Engine::kHf, Hybrid(), {}, "name a folder with the published"},
           {Engine::kHf,
            Hybrid(),
            {"configuration_minicpm_sala.py", "other.py"},
            "auto_map.AutoModelForCausalLM: found modeling_minicpm_sala.X, which transformers "
            "loads from modeling_minicpm_sala.py"},
           {Engine::kHf, no_map, code, "auto_map: found none"},
           {Engine::kHf, own, code, "auto_map.AutoConfig: found none"},
           {Engine::kHf, with("lightning_nh", 2), code, "lightning_nh: found 2"},
           {Engine::kHf, with("lightning_head_dim", 16), code, "it takes head_dim, 8"},
           {Engine::kHf, with("mixer_types", {"lightning-attn", "minicpm4"}), code,
            "mixer_types[0]: found \"lightning-attn\""},
           {Engine::kHf, {{"model_type", "minicpm"}}, {}, "auto_map: found none"},
           {Engine::kSglang, {{"model_type", "minicpm"}}, {}, "auto_map: found none"},
           {Engine::kVllm, {{"model_type", "minicpm"}}, {"c.py"}, "auto_map: found none"},
           {Engine::kVllm, minicpm, {"m.py"}, "auto_map.AutoConfig: found c.C"},
           {Engine::kSglang, minicpm, {"c.py"}, "auto_map.AutoTokenizer: found t.T"},
           {Engine::kSglang, with("torch_dtype", "float64"), code, "torch_dtype: found float64"},
           {Engine::kVllm,
            {{"model_type", "llama"}, {"torch_dtype", "float64"}},
            {},
            "use --dtype bf16"}}) {
    const Status status = CheckEngineConfig(bad.engine, bad.config, bad.files);
    EXPECT_EQ(ErrorCodeOf(status), "EXP-ENGINE");
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kData);
    EXPECT_THAT(MessageOf(status), HasSubstr(bad.text));
  }

  const TempDir dir;
  EXPECT_TRUE(CheckEngineFolder(Engine::kHf, dir.path()).ok());
  EXPECT_EQ(ErrorCodeOf(CheckEngineFolder(Engine::kVllm, dir.path())), "EXP-ENGINE");
  ASSERT_TRUE(WriteFileAtomically(dir / "tokenizer.model", "x").ok());
  EXPECT_TRUE(CheckEngineFolder(Engine::kVllm, dir.path()).ok());
}

TEST(ExportEngine, Commands) {
  const json llama = {{"model_type", "llama"}, {"torch_dtype", "float16"}};
  EXPECT_EQ(LoadCommand(Engine::kVllm, "a/b", llama), "vllm serve a/b");
  EXPECT_EQ(LoadCommand(Engine::kSglang, "it's", Hybrid()),
            "python -m sglang.launch_server --model-path 'it'\\''s' --trust-remote-code"
            "  # upstream SGLang (sgl-project/sglang)");
  EXPECT_EQ(LoadCommand(Engine::kHf, "a", Hybrid()),
            "python -c 'from transformers import AutoModelForCausalLM; "
            "AutoModelForCausalLM.from_pretrained(\"a\", torch_dtype=\"auto\", "
            "trust_remote_code=True)'");
  const auto own = EvalCommands(std::nullopt, "a", llama).value();
  EXPECT_THAT(own[0], HasSubstr("--model hf --model_args 'pretrained=a,dtype=float16'"));
  EXPECT_THAT(EvalCommands(std::nullopt, "a", {{"dtype", "float32"}}).value()[0],
              HasSubstr("pretrained=a,dtype=float32"));
  EXPECT_THAT(EvalCommands(std::nullopt, "a", json::object()).value()[0],
              HasSubstr("pretrained=a,dtype=auto"));
  EXPECT_THAT(own.back(), HasSubstr("sala eval --ckpt a "));
  EXPECT_THAT(EvalCommands(Engine::kSglang, "a", llama).value()[0],
              HasSubstr("base_url=http://localhost:30000/v1/completions"));
  json length = Hybrid();
  length["max_position_embeddings"] = 524288;
  const auto served = EvalCommands(Engine::kVllm, "a", length).value();
  for (size_t task = 0; task + 1 < served.size(); ++task) {
    for (const char* argument :
         {"model=a,", ",tokenizer=a,", ",max_length=524288", ",trust_remote_code=True"})
      EXPECT_THAT(served[task], HasSubstr(argument));
  }
  EXPECT_THAT(EvalCommands(Engine::kVllm, "a", llama).value()[0],
              ::testing::Not(HasSubstr("trust_remote_code")));
  EXPECT_EQ(ErrorCodeOf(EvalCommands(Engine::kHf, "a,b", llama).status()), "USAGE");
}

TEST(ExportBase, TakesWhatIsNotWrittenAndBelongsToTheModel) {
  const TempDir dir;
  const std::unique_ptr<data::Tokenizer> bytes = data::MakeByteTokenizer();
  ASSERT_TRUE(MakeDirectories(dir / "base/sub").ok());
  ASSERT_TRUE(MakeDirectories(dir / "to").ok());
  EXPECT_EQ(ErrorCodeOf(ReadBase(dir / "none", "llama", nullptr).status()), "FILE-MISSING");
  EXPECT_EQ(ErrorCodeOf(ReadBase(dir / "base", "llama", nullptr).status()), "FILE-MISSING");
  const auto write = [&dir](const std::string& name, const std::string& text) {
    ASSERT_TRUE(WriteFileAtomically(dir / name, text).ok());
  };
  write("base/config.json", "{\"model_type\": \"llama\", \"auto_map\": {\"AutoConfig\": \"c.C\"}}");
  EXPECT_THAT(MessageOf(ReadBase(dir / "base", "minicpm", nullptr).status()),
              HasSubstr("EXP-BASE"));
  EXPECT_TRUE(ReadBase(dir / "base", "llama", nullptr)->auto_map.is_null()) << "without code";
  for (const char* name : {"modeling_x.py", "LICENSE", "notice.txt", "generation_config.json",
                           "model.safetensors", "README.md", ".hidden.py.swp"})
    write(std::string("base/") + name, name);
  write("to/generation_config.json", "ours");
  ASSERT_TRUE(bytes->SaveTo(dir / "base").ok());

  const BaseFolder other = ReadBase(dir / "base", "llama", nullptr).value();
  EXPECT_THAT(other.left_out, ::testing::Contains("byte_tokenizer.json"));
  EXPECT_EQ(other.auto_map, (json{{"AutoConfig", "c.C"}}));
  EXPECT_THAT(TakeFromBase(other, dir / "to").value(),
              ElementsAre("LICENSE", "modeling_x.py", "notice.txt"));
  EXPECT_EQ(ReadFile(dir / "to/generation_config.json").value(), "ours");
  EXPECT_EQ(ReadFile(dir / "to/modeling_x.py").value(), "modeling_x.py");

  const BaseFolder same = ReadBase(dir / "base", "llama", bytes.get()).value();
  EXPECT_TRUE(same.left_out.empty());
  write("base/chat_template.jinja", "theirs");
  const BaseFolder chats = ReadBase(dir / "base", "llama", bytes.get()).value();
  write("to/tokenizer_config.json", "{\"chat_template\": \"ours\"}");
  EXPECT_THAT(TakeFromBase(chats, dir / "to").value(), ::testing::Contains("byte_tokenizer.json"));
  EXPECT_FALSE(PathExists(dir / "to/chat_template.jinja"));
  write("to/tokenizer_config.json", "{\"chat_template\": null}");
  EXPECT_THAT(TakeFromBase(chats, dir / "to").value(), ElementsAre("chat_template.jinja"));
}

TEST(ExportStops, TheEndOfATurnIsAddedOnce) {
  const std::unique_ptr<data::Tokenizer> bytes = data::MakeByteTokenizer();  // <|im_end|> is 260
  model::ModelConfig config;
  config.eos_token_id = 2;
  EXPECT_THAT(EosIds(config, nullptr), ElementsAre(2));
  EXPECT_THAT(EosIds(config, bytes.get()), ElementsAre(2, 257, 260));
  config.eos_token_id = 260;
  EXPECT_THAT(EosIds(config, bytes.get()), ElementsAre(260, 257));
  const auto with = [&](const std::string& text) { return WithTurnEnds(text, config, *bytes); };
  const std::string there = "{ \"eos_token_id\":[260, 7], \"top_p\": 0.8 }";
  EXPECT_EQ(with(there), there);
  EXPECT_EQ(json::parse(with("{\"eos_token_id\": 5}"))["eos_token_id"], (json{5, 260}));
  EXPECT_EQ(json::parse(with("{\"top_p\": 0.8}")), (json{{"top_p", 0.8}}))
      << "the model's own eos ends its turns";
  config.eos_token_id = 2;
  EXPECT_EQ(json::parse(with("{}"))["eos_token_id"], (json{2, 260}));
  EXPECT_EQ(with("[]"), "[]");
}

}  // namespace
}  // namespace sala::recipes
