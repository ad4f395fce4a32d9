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
          {"auto_map", {{"AutoModelForCausalLM", "modeling_minicpm_sala.X"}}}};
}

TEST(ExportEngine, SaysWhichFieldAnEngineCannotLoad) {
  const json llama = {{"model_type", "llama"}, {"torch_dtype", "bfloat16"}};
  for (const Engine engine : {Engine::kHf, Engine::kSglang, Engine::kVllm})
    EXPECT_TRUE(CheckEngineConfig(engine, llama, false).ok());
  EXPECT_TRUE(CheckEngineConfig(Engine::kHf, Hybrid(), true).ok());
  EXPECT_TRUE(CheckEngineConfig(Engine::kSglang, Hybrid(), false).ok());

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
    bool has_code;
    const char* text;
  };
  for (const Case& bad : std::vector<Case>{
           {Engine::kVllm, Hybrid(), true, "model_type: found minicpm_sala, which vLLM"},
           {Engine::kHf, Hybrid(), false, "name a folder with the published"},
           {Engine::kHf, no_map, true, "auto_map: found none"},
           {Engine::kHf, with("lightning_nh", 2), true, "lightning_nh: found 2"},
           {Engine::kHf, with("lightning_head_dim", 16), true, "it takes head_dim, 8"},
           {Engine::kHf, with("mixer_types", {"lightning-attn", "minicpm4"}), true,
            "mixer_types[0]: found \"lightning-attn\""},
           {Engine::kHf, {{"model_type", "minicpm"}}, false, "auto_map: found none"},
           {Engine::kSglang, with("torch_dtype", "float64"), true, "torch_dtype: found float64"},
           {Engine::kVllm,
            {{"model_type", "llama"}, {"torch_dtype", "float64"}},
            false,
            "use --dtype bf16"}}) {
    const Status status = CheckEngineConfig(bad.engine, bad.config, bad.has_code);
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
            "python -m sglang.launch_server --model-path 'it'\\''s' --trust-remote-code");
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
  EXPECT_THAT(TakeFromBase(same, dir / "to").value(), ::testing::Contains("byte_tokenizer.json"));
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
