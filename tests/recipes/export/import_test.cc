#include "recipes/import.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/file.h"
#include "core/half.h"
#include "core/rng.h"
#include "recipes/checkpointing.h"
#include "recipes/export.h"
#include "tests/core/temp_dir.h"
#include "tests/recipes/export/released_config.h"

namespace sala::recipes {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// A model folder as another program would leave it, made here by hand: other key orders, other
// spaces, fields that are not read here.
struct Family {
  std::string name;
  std::string config;
  std::string type;  // of the weights
  bool tied = false;
  bool qk_norm = false;
};

std::string ConfigText(const std::string& type, const std::string& more) {
  return R"({"model_type": ")" + type +
         R"(", "transformers_version": "9.9.9", "vocab_size": 40,
  "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-05, "max_position_embeddings": 128,
  "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": [2, 5], "something_new": {"a": [1]})" +
         more + "}";
}

std::vector<Family> Families() {
  return {
      {.name = "llama_bf16",
       .config = ConfigText("llama", R"(, "rope_theta": 5e5)"),
       .type = "BF16"},
      {.name = "llama_f16_new_rope",
       .config = ConfigText("llama",
                            R"(, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6})"),
       .type = "F16"},
      {.name = "llama_f64", .config = ConfigText("llama", ""), .type = "F64"},
      {.name = "qwen3_f32",
       .config = ConfigText("qwen3", R"(, "sliding_window": null, "use_sliding_window": false)"),
       .type = "F32",
       .qk_norm = true},
      {.name = "qwen3_tied",
       .config = ConfigText("qwen3", R"(, "tie_word_embeddings": true)"),
       .type = "BF16",
       .tied = true,
       .qk_norm = true},
      {.name = "minicpm",
       .config = ConfigText(
           "minicpm",
           R"(, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 6, "tie_word_embeddings": false)"),
       .type = "F32"},
  };
}

class HandMadeFolder {
 public:
  HandMadeFolder(std::string directory, const Family& family)
      : directory_(std::move(directory)), type_(family.type) {
    SALA_CHECK(MakeDirectories(directory_).ok());
    Write("config.json", family.config);
    Write("generation_config.json", "{\"eos_token_id\":[2,5],  \"temperature\": 0.7}");
    Write("tokenizer.json", "{\"not\": \"read here\"}");
    Write("tokenizer_config.json", "{}");
    Write("chat_template.jinja", "{{ x }}\n");
    Write("README.md", "stays where it is");
    std::map<std::string, std::vector<int64_t>> shapes = {{"model.embed_tokens.weight", {40, 12}},
                                                          {"model.norm.weight", {12}}};
    if (!family.tied) shapes["lm_head.weight"] = {40, 12};
    for (const char* layer : {"model.layers.0.", "model.layers.1."}) {
      const std::string attention = std::string(layer) + "self_attn.";
      shapes[std::string(layer) + "input_layernorm.weight"] = {12};
      shapes[std::string(layer) + "post_attention_layernorm.weight"] = {12};
      shapes[std::string(layer) + "mlp.gate_proj.weight"] = {20, 12};
      shapes[std::string(layer) + "mlp.up_proj.weight"] = {20, 12};
      shapes[std::string(layer) + "mlp.down_proj.weight"] = {12, 20};
      shapes[attention + "q_proj.weight"] = {24, 12};
      shapes[attention + "k_proj.weight"] = {12, 12};
      shapes[attention + "v_proj.weight"] = {12, 12};
      shapes[attention + "o_proj.weight"] = {12, 24};
      if (!family.qk_norm) continue;
      shapes[attention + "q_norm.weight"] = {6};
      shapes[attention + "k_norm.weight"] = {6};
    }
    for (const auto& [name, shape] : shapes) {
      PhiloxStream rng("v1|1|test||0|weights|" + name);
      int64_t n = 1;
      for (const int64_t d : shape) n *= d;
      std::string bytes;
      for (int64_t i = 0; i < n; ++i) bytes += Value(static_cast<float>(rng.NextNormal()));
      tensors_[name] = {shape, bytes};
    }
    WriteWeights(false);
  }

  // One value in the folder's type.
  std::string Value(float value) const {
    const auto bytes = [](const auto& v) {
      return std::string(reinterpret_cast<const char*>(&v), sizeof v);
    };
    if (type_ == "BF16") return bytes(BF16(value).bits);
    if (type_ == "F16") return bytes(FloatToHalf(value));
    if (type_ == "F64") return bytes(static_cast<double>(value));
    return bytes(value);
  }

  // In one file, or in two with an index; in the order of names backwards and with spaces, which no
  // writer of ours would choose.
  void WriteWeights(bool sharded) {
    std::filesystem::remove(directory_ + "/model.safetensors");
    std::filesystem::remove(directory_ + "/model.safetensors.index.json");
    std::vector<std::string> files = {"model.safetensors"};
    if (sharded) files = {"part-a.safetensors", "part-b.safetensors"};
    std::string map;
    int64_t total = 0;
    for (size_t f = 0; f < files.size(); ++f) {
      std::string header = R"({"__metadata__": {"format": "pt", "by": "hand"})";
      std::string data;
      size_t number = 0;
      for (auto at = tensors_.rbegin(); at != tensors_.rend(); ++at) {
        if (number++ % files.size() != f) continue;
        const auto& [shape, bytes] = at->second;
        header += ", \"" + at->first + R"(": {"shape": )" + nlohmann::json(shape).dump() +
                  R"(, "dtype": ")" + type_ + R"(", "data_offsets": [)" +
                  std::to_string(data.size()) + ", " + std::to_string(data.size() + bytes.size()) +
                  "]}";
        data += bytes;
        map += (map.empty() ? "" : ", ") + ("\"" + at->first + "\": \"" + files[f] + "\"");
        total += static_cast<int64_t>(bytes.size());
      }
      header += "}";
      const uint64_t length = header.size();
      std::string file(reinterpret_cast<const char*>(&length), sizeof length);
      Write(files[f], file + header + data);
    }
    if (!sharded) return;
    Write("model.safetensors.index.json",
          "{\"metadata\": {\"total_size\": " + std::to_string(total) + "},\n \"weight_map\": {" +
              map + "}}");
  }

  void Write(const std::string& name, const std::string& text) {
    SALA_CHECK(WriteFileAtomically(directory_ + "/" + name, text).ok());
  }
  std::map<std::string, std::pair<std::vector<int64_t>, std::string>>& tensors() {
    return tensors_;
  }

 private:
  std::string directory_, type_;
  std::map<std::string, std::pair<std::vector<int64_t>, std::string>> tensors_;
};

std::map<std::string, std::string> Files(const std::string& directory) {
  std::map<std::string, std::string> files;
  const auto names = ListDirectory(directory);
  EXPECT_TRUE(names.ok());
  for (const std::string& name : *names) files[name] = *ReadFile(directory + "/" + name);
  return files;
}

// As `sala export` does it.
StatusOr<ExportReport> Export(const std::string& checkpoint, ExportOptions options) {
  SALA_ASSIGN_OR_RETURN(const LoadedModel model, LoadModel(checkpoint));
  options.source_form = model.source ? &*model.source : nullptr;
  options.tokenizer_directory = checkpoint + "/../../tokenizer";
  options.verify = true;
  return ExportModel(model.config, model.params, nullptr, model.origin, options);
}

class ImportTest : public testing::TestWithParam<std::tuple<Family, bool>> {
 protected:
  static const Family& family() { return std::get<0>(GetParam()); }
  static bool sharded() { return std::get<1>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Families, ImportTest,
                         testing::Combine(testing::ValuesIn(Families()), testing::Bool()),
                         [](const auto& suite) {
                           return std::get<0>(suite.param).name +
                                  (std::get<1>(suite.param) ? "_sharded" : "_single");
                         });

TEST_P(ImportTest, ExportGivesTheFolderBackByteForByte) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", family());
  folder.WriteWeights(sharded());
  const auto report = ImportFolder(
      {.directory = dir / "in", .run = dir / "run", .folder = {.keep_tied = family().tied}});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_EQ(report->checkpoint, dir / "run/checkpoints/step-000000000");
  EXPECT_EQ(report->tensors, static_cast<int64_t>(folder.tensors().size()));
  EXPECT_EQ(report->rounded, 0);
  const auto exported = Export(report->checkpoint, {.directory = dir / "out"});
  ASSERT_TRUE(exported.ok()) << MessageOf(exported.status());
  EXPECT_TRUE(exported->as_source);
  std::map<std::string, std::string> in = Files(dir / "in");
  std::map<std::string, std::string> out = Files(dir / "out");
  EXPECT_EQ(in.erase("README.md"), 1U);
  EXPECT_EQ(out.erase("export.json"), 1U);
  EXPECT_EQ(in, out);
}

TEST_P(ImportTest, WithAnotherTypeTheFolderIsOurs) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", family());
  folder.WriteWeights(sharded());
  const auto report = ImportFolder(
      {.directory = dir / "in", .run = dir / "run", .folder = {.keep_tied = family().tied}});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  const bool same = family().type == "F32";
  const auto exported =
      Export(report->checkpoint, {.directory = dir / "out", .dtype = WeightType::kF32});
  ASSERT_TRUE(exported.ok()) << MessageOf(exported.status());
  EXPECT_EQ(exported->as_source, same);
  EXPECT_EQ(*ReadFile(dir / "out/tokenizer.json"), *ReadFile(dir / "in/tokenizer.json"));
  if (same) return;
  const auto config = nlohmann::json::parse(*ReadFile(dir / "out/config.json"));
  EXPECT_EQ(config["dtype"], "float32");
  EXPECT_EQ(config["model_type"], nlohmann::json::parse(family().config)["model_type"]);
  const auto a = LoadHfFolder(dir / "in");
  const auto b = LoadHfFolder(dir / "out");
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(EmitConfig(a->config), EmitConfig(b->config));
  EXPECT_EQ(std::memcmp(a->params.data(), b->params.data(),
                        static_cast<size_t>(a->params.size()) * sizeof(float)),
            0);
}

TEST(ImportFolderTest, ATiedHeadBecomesACopyUnlessItIsKept) {
  const TempDir dir;
  const Family family = Families()[4];
  ASSERT_TRUE(family.tied);
  HandMadeFolder folder(dir / "in", family);
  const auto untied = ImportFolder({.directory = dir / "in", .run = dir / "untied"});
  ASSERT_TRUE(untied.ok()) << MessageOf(untied.status());
  EXPECT_TRUE(untied->untied);
  const auto model = LoadModel(untied->checkpoint);
  ASSERT_TRUE(model.ok());
  EXPECT_FALSE(model->config.tie_word_embeddings);
  const ConstTensor head = model->params.Get("lm_head.weight");
  EXPECT_EQ(
      std::memcmp(head.Data<float>(), model->params.Get("model.embed_tokens.weight").Data<float>(),
                  static_cast<size_t>(head.numel()) * sizeof(float)),
      0);
  // The folder's config.json says that they are tied, so it is not written again.
  const auto exported = Export(untied->checkpoint, {.directory = dir / "out"});
  ASSERT_TRUE(exported.ok()) << MessageOf(exported.status());
  EXPECT_FALSE(exported->as_source);
  EXPECT_EQ(exported->dtype, WeightType::kBF16) << "of the folder";
  const auto config = nlohmann::json::parse(*ReadFile(dir / "out/config.json"));
  EXPECT_EQ(config["model_type"], "qwen3");
  EXPECT_EQ(config["tie_word_embeddings"], false);
  const auto stored = SafetensorsModel::Open(dir / "out");
  ASSERT_TRUE(stored.ok());
  EXPECT_EQ(*stored->RawBytes("lm_head.weight"), *stored->RawBytes("model.embed_tokens.weight"));

  // A tied folder that repeats its head must repeat it exactly.
  folder.tensors()["lm_head.weight"] = folder.tensors()["model.embed_tokens.weight"];
  folder.WriteWeights(false);
  EXPECT_TRUE(ImportFolder({.directory = dir / "in", .run = dir / "again"}).ok());
  folder.tensors()["lm_head.weight"].second[3] ^= 1;
  folder.WriteWeights(false);
  const Status differs = ImportFolder({.directory = dir / "in", .run = dir / "differs"}).status();
  EXPECT_EQ(ErrorCodeOf(differs), "IMP-EXTRA");
  EXPECT_FALSE(PathExists(dir / "differs"));
}

TEST(ImportFolderTest, WhatTrainingChangedIsNotWrittenAsTheSource) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[3]);
  const auto loaded = LoadModel(dir / "in");
  ASSERT_TRUE(loaded.ok() && loaded->source);
  // Other values: the same form.
  model::ParameterStore params = std::move(LoadHfFolder(dir / "in"))->params;
  params.data()[0] += 1;
  const auto trained = ExportModel(loaded->config, params, nullptr, nullptr,
                                   {.directory = dir / "trained", .source_form = &*loaded->source});
  ASSERT_TRUE(trained.ok()) << MessageOf(trained.status());
  EXPECT_TRUE(trained->as_source);
  EXPECT_EQ(*ReadFile(dir / "trained/config.json"), *ReadFile(dir / "in/config.json"));
  EXPECT_NE(*ReadFile(dir / "trained/model.safetensors"), *ReadFile(dir / "in/model.safetensors"));
  // Another number in the configuration, other tensors: ours.
  for (const auto& change : std::vector<std::function<void(model::ModelConfig&)>>{
           [](model::ModelConfig& c) { c.rope_theta = 2e4; },
           [](model::ModelConfig& c) { c.rms_norm_eps = 1e-6; },
           [](model::ModelConfig& c) { c.attn_qk_norm = false; },
           [](model::ModelConfig& c) {
             c.attn_qk_norm = false;
             c.mixer_types = {"minicpm4", "lightning-attn"};
           }}) {
    model::ModelConfig config = loaded->config;
    change(config);
    const auto ours =
        ExportModel(config, model::ParameterStore(model::ParameterSpecs(config)), nullptr, nullptr,
                    {.directory = dir / "ours", .force = true, .source_form = &*loaded->source});
    ASSERT_TRUE(ours.ok()) << MessageOf(ours.status());
    EXPECT_FALSE(ours->as_source);
    EXPECT_FALSE(
        nlohmann::json::parse(*ReadFile(dir / "ours/config.json")).contains("something_new"));
  }
}

TEST(ImportFolderTest, WithoutATokenizerDirectoryNoneIsWritten) {
  const TempDir dir;
  const HandMadeFolder folder(dir / "in", Families()[0]);
  const auto loaded = LoadModel(dir / "in");
  ASSERT_TRUE(loaded.ok() && loaded->source);
  const auto report = ExportModel(loaded->config, loaded->params, nullptr, nullptr,
                                  {.directory = dir / "none", .source_form = &*loaded->source});
  ASSERT_TRUE(report.ok());
  EXPECT_TRUE(report->as_source);
  EXPECT_FALSE(PathExists(dir / "none/tokenizer.json"));
}

TEST(ImportFolderTest, NumbersOfEveryKindAreReported) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[3]);
  for (const char* layer : {"0", "1"}) {
    std::string& bytes =
        folder.tensors()["model.layers." + std::string(layer) + ".input_layernorm.weight"].second;
    bytes.clear();
    for (int i = 0; i < 12; ++i) bytes += folder.Value(*layer == '0' ? 1.0F : -3.0F);
  }
  folder.WriteWeights(false);
  const auto report = ImportFolder({.directory = dir / "in", .run = dir / "run"});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  int64_t tensors = 0;
  bool found = false;
  for (const TensorKindReport& kind : report->kinds) {
    tensors += kind.tensors;
    EXPECT_EQ(kind.type, "F32");
    if (kind.kind != "model.layers.*.input_layernorm.weight") continue;
    found = true;
    EXPECT_THAT(kind.shape, ElementsAre(12));
    EXPECT_EQ(kind.tensors, 2);
    EXPECT_EQ(kind.mean, -1);
    EXPECT_EQ(kind.standard_deviation, 2);
    EXPECT_EQ(kind.absolute_max, 3);
  }
  EXPECT_TRUE(found);
  EXPECT_EQ(tensors, report->tensors);
}

TEST(ImportFolderTest, ValuesThatFloat32DoesNotHoldAreCountedOrRefused) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[2]);
  const auto set = [&](size_t element, double value) {
    std::memcpy(folder.tensors()["model.norm.weight"].second.data() + element * 8, &value, 8);
    folder.WriteWeights(false);
  };
  set(4, 0.1);
  set(7, 1.0 + 0x1p-30);
  auto report = ImportFolder({.directory = dir / "in", .run = dir / "a"});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_EQ(report->rounded, 2);
  const auto model = LoadModel(report->checkpoint);
  EXPECT_EQ(model->params.Get("model.norm.weight").Data<float>()[4], 0.1F) << "the nearest";
  for (const auto& [value, text] : std::vector<std::pair<double, std::string>>{
           {1e300, "is 1e+300, too large for float32"},
           {-std::numeric_limits<double>::infinity(), "is -inf, not a finite number"},
           {std::numeric_limits<double>::quiet_NaN(), "is nan, not a finite number"}}) {
    set(5, value);
    const Status refused = ImportFolder({.directory = dir / "in", .run = dir / "b"}).status();
    EXPECT_EQ(ErrorCodeOf(refused), "IMP-NUMBERS");
    EXPECT_THAT(MessageOf(refused), HasSubstr("model.norm.weight: element 5 " + text));
    EXPECT_TRUE(ListCheckpoints(dir / "b/checkpoints").empty());
    EXPECT_FALSE(PathExists(dir / "b/tokenizer"));
  }
}

TEST(ImportFolderTest, AnInterruptedImportCanBeStartedAgain) {
  const TempDir dir;
  const HandMadeFolder folder(dir / "in", Families()[0]);
  ASSERT_TRUE(MakeDirectories(dir / "run/checkpoints/.tmp-step-000000000-1").ok());
  const auto report = ImportFolder({.directory = dir / "in", .run = dir / "run"});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_FALSE(PathExists(dir / "run/checkpoints/.tmp-step-000000000-1"));
}

TEST(ImportFolderTest, AnEndlesslyNestedFileIsRefused) {
  const TempDir dir;
  const HandMadeFolder folder(dir / "in", Families()[0]);
  constexpr size_t kDepth = 200000;
  const std::string deep = std::string(kDepth, '[') + std::string(kDepth, ']');
  const auto config = ReadFile(dir / "in/config.json");
  ASSERT_TRUE(config.ok());
  const std::string spoilt = "{\"rope_scaling\": " + deep + "," + config->substr(1);
  ASSERT_TRUE(WriteFileAtomically(dir / "in/config.json", spoilt).ok());
  const Status refused = CheckFolder(dir / "in", {}).status();
  EXPECT_EQ(ErrorCodeOf(refused), "IMP-FIELD");
  EXPECT_THAT(MessageOf(refused), HasSubstr("nested more than 64 deep"));
}

TEST(ImportFolderTest, APlaceThatIsUsedIsLeftAlone) {
  const TempDir dir;
  const HandMadeFolder folder(dir / "in", Families()[0]);
  ASSERT_TRUE(ImportFolder({.directory = dir / "in", .run = dir / "run"}).ok());
  const Status again = ImportFolder({.directory = dir / "in", .run = dir / "run"}).status();
  EXPECT_EQ(ErrorCodeOf(again), "IMP-EXISTS");
  EXPECT_EQ(ExitCodeOf(again), ExitCode::kIo);
}

TEST(ImportFolderTest, AnInterruptedImportIsDoneAgain) {
  const TempDir dir;
  const HandMadeFolder folder(dir / "in", Families()[0]);
  const std::string run = dir / "run";
  const auto import = [&] { return ImportFolder({.directory = dir / "in", .run = run}).status(); };
  const auto interrupted = [&] {
    ASSERT_TRUE(MakeDirectories(run + "/checkpoints/.tmp-step-000000000-1").ok());
    ASSERT_TRUE(MakeDirectories(run + "/tokenizer").ok());
    ASSERT_TRUE(MakeDirectories(run + "/tokenizer.tmp-import").ok());
    ASSERT_TRUE(
        WriteFileAtomically(run + "/tokenizer/tokenizer.json", "{\"not\": \"read here\"}").ok());
  };
  interrupted();
  EXPECT_TRUE(import().ok()) << MessageOf(import());
  EXPECT_FALSE(PathExists(run + "/tokenizer.tmp-import"));
  EXPECT_THAT(*ListDirectory(run + "/tokenizer"),
              ElementsAre("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"));

  // A tokenizer that is not the folder's may be wanted by somebody.
  ASSERT_TRUE(RemoveTree(run).ok());
  interrupted();
  ASSERT_TRUE(WriteFileAtomically(run + "/tokenizer/tokenizer.json", "another").ok());
  EXPECT_EQ(ErrorCodeOf(import()), "IMP-EXISTS");
  EXPECT_EQ(*ReadFile(run + "/tokenizer/tokenizer.json"), "another");

  // A run that goes on is left alone.
  ASSERT_TRUE(RemoveTree(run).ok());
  interrupted();
  ASSERT_TRUE(WriteFileAtomically(run + "/RUN.lock", "{}").ok());
  EXPECT_EQ(ErrorCodeOf(import()), "IMP-EXISTS");
  EXPECT_TRUE(PathExists(run + "/checkpoints/.tmp-step-000000000-1"));
}

TEST(ImportFolderTest, AModelFolderIsNoRunDirectory) {
  const TempDir dir;
  const HandMadeFolder folder(dir / "in", Families()[0]);
  const std::vector<std::string> before = *ListDirectory(dir / "in");
  const Status refused = ImportFolder({.directory = dir / "in", .run = dir / "in"}).status();
  EXPECT_EQ(ErrorCodeOf(refused), "IMP-EXISTS");
  EXPECT_THAT(MessageOf(refused), HasSubstr("is a model folder (config.json)"));
  EXPECT_EQ(*ListDirectory(dir / "in"), before);
}

TEST(ImportFolderTest, TokenIdsLieInTheVocabulary) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[0]);
  const nlohmann::json good = nlohmann::json::parse(Families()[0].config);
  for (const auto& [key, value] : std::vector<std::pair<std::string, nlohmann::json>>{
           {"eos_token_id", 40}, {"eos_token_id", {2, 40}}, {"bos_token_id", 9000}}) {
    nlohmann::json config = good;
    config[key] = value;
    folder.Write("config.json", config.dump());
    const Status refused = CheckFolder(dir / "in", {}).status();
    EXPECT_EQ(ErrorCodeOf(refused), "IMP-FIELD") << key << value;
    EXPECT_THAT(MessageOf(refused), HasSubstr("expected ids below vocab_size 40"));
  }
  nlohmann::json config = good;
  config["eos_token_id"] = 39;
  config["pad_token_id"] = 40;  // as older files have it; nothing reads it
  folder.Write("config.json", config.dump());
  EXPECT_TRUE(CheckFolder(dir / "in", {}).ok());
}

TEST(ImportFolderTest, TheNamedArchitectureMustBeTheFolders) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[0]);
  EXPECT_TRUE(CheckFolder(dir / "in", {.arch = "llama"}).ok());
  const Status other = CheckFolder(dir / "in", {.arch = "qwen3"}).status();
  EXPECT_EQ(ErrorCodeOf(other), "IMP-ARCH");
  EXPECT_THAT(MessageOf(other), HasSubstr("model_type is \"llama\", --arch says qwen3"));
  nlohmann::json config = nlohmann::json::parse(Families()[0].config);
  config.erase("model_type");
  folder.Write("config.json", config.dump());
  EXPECT_EQ(ErrorCodeOf(CheckFolder(dir / "in", {}).status()), "IMP-FIELD");
  EXPECT_TRUE(CheckFolder(dir / "in", {.arch = "llama"}).ok()) << "a file that does not say";
}

TEST(ImportFolderTest, ACheckWritesNothingAndNamesWhatIsWrong) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[0]);
  const auto report = CheckFolder(dir / "in", {});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_EQ(report->tensors, 21);
  EXPECT_THAT(*ListDirectory(dir.path()), ElementsAre("in"));
  const auto all = folder.tensors();
  const auto code = [&] {
    folder.WriteWeights(false);
    const Status status = CheckFolder(dir / "in", {}).status();
    return ErrorCodeOf(status) + " " + MessageOf(status);
  };
  folder.tensors().erase("model.layers.1.mlp.up_proj.weight");
  EXPECT_THAT(code(), testing::AllOf(HasSubstr("IMP-MISSING"),
                                     HasSubstr("model.layers.1.mlp.up_proj.weight")));
  folder.tensors() = all;
  folder.tensors()["model.layers.2.mlp.up_proj.weight"] =
      all.at("model.layers.1.mlp.up_proj.weight");
  EXPECT_THAT(code(), testing::AllOf(HasSubstr("IMP-EXTRA"),
                                     HasSubstr("model.layers.2.mlp.up_proj.weight")));
  folder.tensors() = all;
  folder.tensors()["model.layers.1.mlp.up_proj.weight"] =
      all.at("model.layers.1.mlp.down_proj.weight");
  EXPECT_THAT(code(),
              testing::AllOf(HasSubstr("IMP-SHAPE"), HasSubstr("[12,20], expected [20,12]")));
}

TEST(SourceRecordTest, ComesBackFromItsText) {
  const TempDir dir;
  HandMadeFolder folder(dir / "in", Families()[0]);
  folder.WriteWeights(true);
  const auto record = SourceRecordAt(dir / "in");
  ASSERT_TRUE(record.ok() && *record);
  EXPECT_EQ((*record)->config, Families()[0].config);
  EXPECT_EQ((*record)->headers.size(), 2U);
  EXPECT_THAT((*record)->tokenizer_files,
              ElementsAre("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"));
  const std::string text = (*record)->ToText();
  const auto back = SourceRecord::Parse(text, "x");
  ASSERT_TRUE(back.ok()) << MessageOf(back.status());
  EXPECT_EQ(back->ToText(), text);
  EXPECT_EQ(back->generation_config, (*record)->generation_config);
  for (const char* bad : {"", "[]", "{}", R"({"version": 2})"})
    EXPECT_EQ(ErrorCodeOf(SourceRecord::Parse(bad, "x").status()), "CKPT-VERSION") << bad;
  // An export writes these names: they must not lead out of its folder.
  for (const char* name : {"../model.safetensors", "config.json", ""}) {
    SourceRecord other = *back;
    other.headers[0].first = name;
    EXPECT_EQ(ErrorCodeOf(SourceRecord::Parse(other.ToText(), "x").status()), "CKPT-VERSION")
        << name;
    other = *back;
    other.tokenizer_files.push_back(name);
    EXPECT_EQ(ErrorCodeOf(SourceRecord::Parse(other.ToText(), "x").status()), "CKPT-VERSION")
        << name;
  }
}

// ---- the released 9B model, without its values ----

TEST(ReleasedModelTest, ShapesOnlyWritesItsFolder) {
  const nlohmann::json facts = ReleasedFacts();
  const auto config = ModelConfigFromHf(facts["config"], "config.json");
  ASSERT_TRUE(config.ok());
  for (const auto& [dtype, type, width] : std::vector<std::tuple<WeightType, std::string, int64_t>>{
           {WeightType::kBF16, "BF16", 1}, {WeightType::kF32, "F32", 2}}) {
    const TempDir dir;
    const int64_t total = facts["total_size"].get<int64_t>() * width;
    const auto report =
        ExportShapes(*config, facts["config"]["eos_token_id"].get<std::vector<int64_t>>(),
                     {.directory = dir / "out", .dtype = dtype});
    ASSERT_TRUE(report.ok()) << MessageOf(report.status());
    EXPECT_EQ(report->tensors, facts["tensor_count"]);
    EXPECT_EQ(report->parameters, facts["parameters"]);
    EXPECT_EQ(report->bytes, total);

    const auto written = nlohmann::json::parse(*ReadFile(dir / "out/config.json"));
    for (const auto& [key, value] : facts["config"].items()) {
      if (key == "dtype" && dtype != WeightType::kBF16) {
        EXPECT_EQ(written[key], "float32");
      } else {
        EXPECT_EQ(written.value(key, nlohmann::json("absent")), value) << key;
      }
    }
    EXPECT_EQ(nlohmann::json::parse(*ReadFile(dir / "out/generation_config.json")),
              facts["generation_config"]);
    const auto stored = SafetensorsModel::Open(dir / "out");
    ASSERT_TRUE(stored.ok()) << MessageOf(stored.status());
    std::map<std::string, std::vector<int64_t>> shapes;
    int64_t bytes = 0;
    for (const std::string& name : stored->names()) {
      shapes[name] = stored->Find(name)->shape;
      bytes += stored->Find(name)->bytes;
      EXPECT_EQ(stored->Find(name)->dtype, type) << name;
    }
    EXPECT_EQ(shapes, ReleasedShapes());
    EXPECT_EQ(bytes, total);
    EXPECT_EQ(nlohmann::json::parse(stored->index_text())["metadata"]["total_size"], total);
    int64_t blocks = 0;
    int64_t size = 0;
    const auto names = ListDirectory(dir / "out");
    ASSERT_TRUE(names.ok());
    for (const std::string& name : *names) {
      struct stat info {};
      ASSERT_EQ(::stat((dir / ("out/" + name)).c_str(), &info), 0);
      EXPECT_LE(info.st_size, kMaxShardBytes + (1 << 20)) << name << ", its header included";
      blocks += info.st_blocks;
      size += info.st_size;
    }
    EXPECT_GT(size, total);
    EXPECT_LT(blocks * 512, 1 << 20) << "of " << size;
    // And back: the folder is the model.
    const auto checked = CheckFolder(dir / "out", {});
    ASSERT_TRUE(checked.ok()) << MessageOf(checked.status());
    EXPECT_EQ(EmitConfig(checked->config), EmitConfig(*config));
    EXPECT_EQ(checked->parameters, facts["parameters"]);
    EXPECT_EQ(ErrorCodeOf(ImportFolder({.directory = dir / "out", .run = dir / "run"}).status()),
              "IMP-EMPTY");
    EXPECT_EQ(ErrorCodeOf(LoadHfFolder(dir / "out").status()), "IMP-EMPTY");
  }
}

}  // namespace
}  // namespace sala::recipes
