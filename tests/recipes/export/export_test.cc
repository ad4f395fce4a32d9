#include "recipes/export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/config.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/rng.h"
#include "core/safetensors.h"
#include "recipes/checkpointing.h"
#include "recipes/model_tokenizer.h"
#include "tests/core/temp_dir.h"

namespace sala::recipes {
namespace {

using testing::HasSubstr;

model::ModelConfig Teacher() {
  model::ModelConfig config;
  config.vocab_size = 270;
  config.hidden_size = 24;
  config.intermediate_size = 40;
  config.num_hidden_layers = 3;
  config.num_attention_heads = 4;
  config.num_key_value_heads = 2;
  config.head_dim = 6;
  config.dim_model_base = 12;
  config.scale_emb = 12;
  config.bos_token_id = 256;
  config.eos_token_id = 257;
  config.pad_token_id = 258;
  SALA_CHECK(config.Resolve().ok());
  return config;
}

model::ModelConfig Hybrid() {
  model::ModelConfig config = Teacher();
  config.attn_use_rope = false;
  config.attn_use_output_gate = true;
  config.mixer_types = {"minicpm4", "lightning-attn", "minicpm4"};
  SALA_CHECK(config.Resolve().ok());
  return config;
}

// Weights of many magnitudes, each with a full float32 mantissa, so that rounding is exercised.
model::ParameterStore RandomParameters(const model::ModelConfig& config) {
  model::ParameterStore params(model::ParameterSpecs(config));
  for (const model::ParameterSpec& spec : params.specs()) {
    PhiloxStream rng("v1|7|test||0|weights|" + spec.name);
    float* data = params.data() + spec.offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      data[i] = static_cast<float>(rng.NextNormal() *
                                   std::exp2(static_cast<double>(rng.Bounded(40)) - 20.0));
    }
  }
  return params;
}

nlohmann::json ReadJson(const std::string& path) {
  const auto text = ReadFile(path);
  EXPECT_TRUE(text.ok()) << path;
  return text.ok() ? nlohmann::json::parse(*text) : nlohmann::json();
}

// IEEE rounding to nearest, ties to even, by comparing with the two neighbours: another way than
// the code under test.
uint16_t NearestBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto below = static_cast<uint16_t>(bits >> 16);  // towards zero
  const auto above = static_cast<uint16_t>(below + 1);
  const auto widen = [](uint16_t b) {
    return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(b) << 16));
  };
  const double to_below = std::fabs(static_cast<double>(value) - widen(below));
  const double to_above = std::fabs(widen(above) - static_cast<double>(value));
  if (to_below != to_above) return to_below < to_above ? below : above;
  return below % 2 == 0 ? below : above;
}

class ExportTest : public testing::TestWithParam<bool> {
 protected:
  static model::ModelConfig Config() { return GetParam() ? Hybrid() : Teacher(); }
};

INSTANTIATE_TEST_SUITE_P(Models, ExportTest, testing::Bool(),
                         [](const auto& suite) { return suite.param ? "Hybrid" : "Teacher"; });

TEST_P(ExportTest, Float32ComesBackBitForBit) {
  const TempDir dir;
  const model::ModelConfig config = Config();
  const model::ParameterStore params = RandomParameters(config);
  const auto report =
      ExportModel(config, params, nullptr, nullptr,
                  {.directory = dir / "out", .dtype = WeightType::kF32, .verify = true});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_EQ(report->parameters, params.parameters());
  EXPECT_EQ(report->bytes, params.parameters() * 4);
  const auto back = LoadHfFolder(dir / "out");
  ASSERT_TRUE(back.ok()) << MessageOf(back.status());
  EXPECT_EQ(EmitConfig(back->config), EmitConfig(config));
  ASSERT_EQ(back->params.size(), params.size());
  EXPECT_EQ(std::memcmp(back->params.data(), params.data(),
                        static_cast<size_t>(params.size()) * sizeof(float)),
            0);
}

TEST_P(ExportTest, Bf16IsTheNearestOfEveryWeight) {
  const TempDir dir;
  const model::ModelConfig config = Config();
  model::ParameterStore params = RandomParameters(config);
  params.data()[0] = 1.0F + 0x1p-8F;  // halfway: the even neighbour is below
  params.data()[1] = 1.0F + 0x3p-8F;  // halfway: the even neighbour is above
  params.data()[2] = -0.0F;
  params.data()[3] = 0x1p-140F;  // subnormal
  const auto report =
      ExportModel(config, params, nullptr, nullptr, {.directory = dir / "out", .verify = true});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_TRUE(report->verified);
  const auto stored = SafetensorsModel::Open(dir / "out");
  ASSERT_TRUE(stored.ok());
  EXPECT_EQ(stored->names().size(), params.specs().size());
  for (const model::ParameterSpec& spec : params.specs()) {
    const SafetensorsEntry* entry = stored->Find(spec.name);
    ASSERT_NE(entry, nullptr) << spec.name;
    EXPECT_EQ(entry->dtype, "BF16");
    EXPECT_EQ(entry->shape, spec.shape);
    const auto bytes = stored->RawBytes(spec.name);
    ASSERT_TRUE(bytes.ok());
    ASSERT_EQ(bytes->size(), static_cast<size_t>(spec.numel) * 2);
    for (int64_t i = 0; i < spec.numel; ++i) {
      uint16_t bits = 0;
      std::memcpy(&bits, bytes->data() + i * 2, 2);
      ASSERT_EQ(bits, NearestBf16(params.data()[spec.offset + i])) << spec.name << " element " << i;
    }
  }
}

TEST_P(ExportTest, AFolderExportedAgainIsTheSame) {
  const TempDir dir;
  const model::ModelConfig config = Config();
  ASSERT_TRUE(
      ExportModel(config, RandomParameters(config), nullptr, nullptr, {.directory = dir / "a"})
          .ok());
  const auto loaded = LoadHfFolder(dir / "a");
  ASSERT_TRUE(loaded.ok());
  ASSERT_TRUE(
      ExportModel(loaded->config, loaded->params, nullptr, nullptr, {.directory = dir / "b"}).ok());
  EXPECT_EQ(*ReadFile(dir / "a/model.safetensors"), *ReadFile(dir / "b/model.safetensors"));
  EXPECT_EQ(*ReadFile(dir / "a/config.json"), *ReadFile(dir / "b/config.json"));
}

TEST(ExportFolderTest, HoldsConfigTokenizerAndARecordOfEveryFile) {
  const TempDir dir;
  const model::ModelConfig config = Hybrid();
  const std::unique_ptr<data::Tokenizer> tokenizer = data::MakeByteTokenizer();
  const nlohmann::json source = {
      {"path", "run/checkpoints/step-000000007"}, {"save_id", "abc"}, {"step", 7}};
  ASSERT_TRUE(ExportModel(config, RandomParameters(config), tokenizer.get(), source,
                          {.directory = dir / "out/"})
                  .ok());
  EXPECT_EQ(ReadJson(dir / "out/config.json")["model_type"], "minicpm_sala");
  const int32_t im_end = tokenizer->added_tokens().at(data::kImEnd);
  EXPECT_EQ(ReadJson(dir / "out/generation_config.json")["eos_token_id"],
            nlohmann::json({257, im_end}));
  const nlohmann::json record = ReadJson(dir / "out/export.json");
  EXPECT_EQ(record["source"], source);
  EXPECT_EQ(record["tokenizer_fingerprint"], tokenizer->fingerprint());
  const auto names = ListDirectory(dir / "out");
  ASSERT_TRUE(names.ok());
  for (const std::string& name : *names) {
    if (name == "export.json") continue;
    EXPECT_EQ(record["sha256"][name], Sha256Hex(*ReadFile(dir / ("out/" + name)))) << name;
  }
  EXPECT_EQ(record["sha256"].size() + 1, names->size());
  const auto again = data::LoadTokenizer(dir / "out");
  ASSERT_TRUE(again.ok()) << MessageOf(again.status());
  EXPECT_EQ((*again)->fingerprint(), tokenizer->fingerprint());
}

TEST(ExportFolderTest, TheTokenizersFingerprintComesBack) {
  const TempDir dir;
  const model::ModelConfig config = Hybrid();
  const model::ParameterStore params = RandomParameters(config);
  const std::unique_ptr<data::Tokenizer> tokenizer = data::MakeByteTokenizer();
  ASSERT_TRUE(
      ExportModel(config, params, tokenizer.get(), nullptr, {.directory = dir / "with"}).ok());
  EXPECT_EQ(LoadModel(dir / "with")->tokenizer_fingerprint, tokenizer->fingerprint());
  // Without the tokenizer's files what is known of it is kept; where nothing is known, nothing is
  // said; a folder of another program has no record at all.
  ASSERT_TRUE(ExportModel(config, params, nullptr, nullptr,
                          {.directory = dir / "without", .tokenizer_fingerprint = "abc"})
                  .ok());
  EXPECT_EQ(LoadModel(dir / "without")->tokenizer_fingerprint, "abc");
  ASSERT_TRUE(ExportModel(config, params, nullptr, nullptr, {.directory = dir / "unknown"}).ok());
  EXPECT_EQ(LoadModel(dir / "unknown")->tokenizer_fingerprint, "");
  std::filesystem::remove(dir / "with/export.json");
  EXPECT_EQ(LoadModel(dir / "with")->tokenizer_fingerprint, "");
  for (const char* broken : {"{", "[]", "{\"tokenizer_fingerprint\": 7}"}) {
    ASSERT_TRUE(WriteFileAtomically(dir / "with/export.json", broken).ok());
    EXPECT_EQ(ErrorCodeOf(LoadModel(dir / "with").status()), "IMP-FIELD") << broken;
  }
}

TEST(ExportFolderTest, LargeModelsAreCutIntoShards) {
  const TempDir dir;
  const model::ModelConfig config = Hybrid();
  const model::ParameterStore params = RandomParameters(config);
  const auto report = ExportModel(config, params, nullptr, nullptr,
                                  {.directory = dir / "out",
                                   .dtype = WeightType::kF32,
                                   .verify = true,
                                   .max_shard_bytes = 30000});
  ASSERT_TRUE(report.ok()) << MessageOf(report.status());
  EXPECT_EQ(ReadJson(dir / "out/model.safetensors.index.json")["metadata"]["total_size"],
            params.parameters() * 4);
  const auto back = LoadHfFolder(dir / "out");
  ASSERT_TRUE(back.ok()) << MessageOf(back.status());
  EXPECT_EQ(std::memcmp(back->params.data(), params.data(),
                        static_cast<size_t>(params.size()) * sizeof(float)),
            0);
}

TEST(ExportFolderTest, AnOccupiedPlaceIsKeptUnlessForced) {
  const TempDir dir;
  const model::ModelConfig config = Teacher();
  const model::ParameterStore params = RandomParameters(config);
  ExportOptions options{.directory = dir / "out"};
  ASSERT_TRUE(MakeDirectories(dir / "out").ok());
  ASSERT_TRUE(ExportModel(config, params, nullptr, nullptr, options).ok())
      << "an empty directory is no obstacle";
  const std::string before = *ReadFile(dir / "out/export.json");
  auto second = ExportModel(config, params, nullptr, {{"save_id", "other"}}, options);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(ErrorCodeOf(second.status()), "EXP-EXISTS");
  EXPECT_EQ(ExitCodeOf(second.status()), ExitCode::kIo);
  EXPECT_EQ(*ReadFile(dir / "out/export.json"), before);
  options.force = true;
  ASSERT_TRUE(ExportModel(config, params, nullptr, {{"save_id", "other"}}, options).ok());
  EXPECT_EQ(ReadJson(dir / "out/export.json")["source"]["save_id"], "other");
  EXPECT_THAT(*ListDirectory(dir.path()), testing::ElementsAre("out"));
}

TEST(ExportFolderTest, ForceDoesNotRemoveOtherDirectories) {
  const TempDir dir;
  ASSERT_TRUE(MakeDirectories(dir / "home").ok());
  ASSERT_TRUE(WriteFileAtomically(dir / "home/letter.txt", "dear").ok());
  const model::ModelConfig config = Teacher();
  const auto report = ExportModel(config, RandomParameters(config), nullptr, nullptr,
                                  {.directory = dir / "home", .force = true});
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(ErrorCodeOf(report.status()), "EXP-EXISTS");
  EXPECT_EQ(*ReadFile(dir / "home/letter.txt"), "dear");
}

TEST(ExportFolderTest, AFailureLeavesNothing) {
  const TempDir dir;
  const model::ModelConfig config = Teacher();
  model::ParameterStore params = RandomParameters(config);
  params.Get("model.norm.weight").Data<float>()[3] = std::numeric_limits<float>::quiet_NaN();
  auto report = ExportModel(config, params, nullptr, nullptr, {.directory = dir / "out"});
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(ErrorCodeOf(report.status()), "EXP-NUMBERS");
  EXPECT_THAT(MessageOf(report.status()), HasSubstr("model.norm.weight: element 3"));
  // Finite in float32 but beyond the largest bf16.
  params.Get("model.norm.weight").Data<float>()[3] = std::numeric_limits<float>::max();
  EXPECT_FALSE(ExportModel(config, params, nullptr, nullptr, {.directory = dir / "out"}).ok());
  EXPECT_TRUE(ListDirectory(dir.path())->empty());
  EXPECT_TRUE(ExportModel(config, params, nullptr, nullptr,
                          {.directory = dir / "out", .dtype = WeightType::kF32})
                  .ok());

  // The directory above is a file: nothing can be written.
  ASSERT_TRUE(WriteFileAtomically(dir / "file", "x").ok());
  EXPECT_FALSE(ExportModel(config, params, nullptr, nullptr,
                           {.directory = dir / "file/out", .dtype = WeightType::kF32})
                   .ok());
}

TEST(ExportFolderTest, ATokenizerLargerThanTheModelIsRefused) {
  const TempDir dir;
  model::ModelConfig config = Teacher();
  config.vocab_size = 100;
  const auto report = ExportModel(config, RandomParameters(config), data::MakeByteTokenizer().get(),
                                  nullptr, {.directory = dir / "out"});
  ASSERT_FALSE(report.ok());
  EXPECT_EQ(ErrorCodeOf(report.status()), "EXP-TOKENIZER");
}

TEST(ExportFolderTest, TiedEmbeddingsComeBackUntied) {
  const TempDir dir;
  model::ModelConfig config = Teacher();
  config.tie_word_embeddings = true;
  const model::ParameterStore params = RandomParameters(config);
  ASSERT_TRUE(ExportModel(config, params, nullptr, nullptr,
                          {.directory = dir / "out", .dtype = WeightType::kF32})
                  .ok());
  EXPECT_EQ(ReadJson(dir / "out/config.json")["tie_word_embeddings"], true);
  const auto back = LoadHfFolder(dir / "out");
  ASSERT_TRUE(back.ok()) << MessageOf(back.status());
  EXPECT_FALSE(back->config.tie_word_embeddings);
  const ConstTensor embedding = params.Get("model.embed_tokens.weight");
  const ConstTensor head = back->params.Get("lm_head.weight");
  ASSERT_EQ(head.numel(), embedding.numel());
  EXPECT_EQ(std::memcmp(head.Data<float>(), embedding.Data<float>(),
                        static_cast<size_t>(head.numel()) * sizeof(float)),
            0);
}

// A folder with the given tensors of a teacher left out or added.
class ForeignFolder {
 public:
  explicit ForeignFolder(const std::string& directory)
      : directory_(directory), params_(RandomParameters(Teacher())) {
    EXPECT_TRUE(ExportModel(Teacher(), params_, nullptr, nullptr, {.directory = directory}).ok());
    for (const model::ParameterSpec& spec : params_.specs()) {
      tensors.push_back({.name = spec.name,
                         .dtype = DType::kF32,
                         .shape = spec.shape,
                         .data = params_.data() + spec.offset});
    }
  }
  Status Load() {
    EXPECT_TRUE(WriteSafetensors(directory_ + "/model.safetensors", tensors, {}).ok());
    return LoadHfFolder(directory_).status();
  }
  const float* data() const { return params_.data(); }
  std::vector<SafetensorsTensor> tensors;

 private:
  std::string directory_;
  model::ParameterStore params_;
};

TEST(LoadHfFolderTest, MissingAndExtraTensorsAreNamed) {
  const TempDir dir;
  ForeignFolder folder(dir / "in");
  EXPECT_TRUE(folder.Load().ok());
  const std::vector<SafetensorsTensor> all = folder.tensors;

  folder.tensors.erase(folder.tensors.begin() + 2);
  EXPECT_EQ(ErrorCodeOf(folder.Load()), "IMP-MISSING");
  EXPECT_THAT(MessageOf(folder.Load()), HasSubstr(all[2].name));

  folder.tensors = all;
  folder.tensors.push_back({.name = "model.layers.0.self_attn.q_proj.bias",
                            .dtype = DType::kF32,
                            .shape = {24},
                            .data = folder.data()});
  EXPECT_EQ(ErrorCodeOf(folder.Load()), "IMP-BIAS");
  folder.tensors.back().name = "vision.weight";
  EXPECT_EQ(ErrorCodeOf(folder.Load()), "IMP-EXTRA");
  EXPECT_THAT(MessageOf(folder.Load()), HasSubstr("vision.weight"));
  // One bias among other tensors is still what to say.
  folder.tensors.push_back(
      {.name = "z.bias", .dtype = DType::kF32, .shape = {24}, .data = folder.data()});
  EXPECT_EQ(ErrorCodeOf(folder.Load()), "IMP-BIAS");
  folder.tensors.pop_back();
  // Computed here, so a stored table is not needed.
  folder.tensors.back().name = "model.layers.0.self_attn.rotary_emb.inv_freq";
  EXPECT_TRUE(folder.Load().ok());
}

TEST(LoadHfFolderTest, AnotherShapeThanTheConfigurationIsRefused) {
  const TempDir dir;
  ForeignFolder folder(dir / "in");
  ASSERT_EQ(folder.tensors[0].name, "model.embed_tokens.weight");
  folder.tensors[0].shape[0] -= 1;
  EXPECT_EQ(ErrorCodeOf(folder.Load()), "IMP-SHAPE");
  EXPECT_THAT(MessageOf(folder.Load()),
              HasSubstr("model.embed_tokens.weight has shape [269,24], expected [270,24]"));
}

TEST(LoadHfFolderTest, TypesThatAreNoWeightsAreRefused) {
  const TempDir dir;
  ForeignFolder folder(dir / "in");
  folder.tensors[0].dtype = DType::kI32;
  EXPECT_EQ(ErrorCodeOf(folder.Load()), "ST-DTYPE");
  EXPECT_THAT(MessageOf(folder.Load()), HasSubstr("model.embed_tokens.weight is I32"));
}

// What a tensor rank has of a whole tensor, row by row.
std::vector<float> BoxOf(const model::ParameterStore& whole, const model::ParameterSpec& spec) {
  const std::vector<int64_t> box = spec.box_shape();
  const float* from = whole.data() + whole.Spec(spec.name).offset;
  if (box.size() == 1) return {from + spec.box_offset[0], from + spec.box_offset[0] + box[0]};
  std::vector<float> values;
  for (int64_t row = 0; row < box[0]; ++row) {
    const float* begin =
        from + (spec.box_offset[0] + row) * spec.global_shape[1] + spec.box_offset[1];
    values.insert(values.end(), begin, begin + box[1]);
  }
  return values;
}

// Whatever the cut, a rank reads its part of the whole.
TEST(LoadHfFolderTest, ALayoutGetsItsPartOfEveryTensor) {
  const TempDir dir;
  for (const bool tied : {false, true}) {
    model::ModelConfig config = Hybrid();
    config.tie_word_embeddings = tied;
    ASSERT_TRUE(ExportModel(config, RandomParameters(config), nullptr, nullptr,
                            {.directory = dir / "in", .dtype = WeightType::kF32, .force = true})
                    .ok());
    const auto whole = LoadHfFolder(dir / "in");
    ASSERT_TRUE(whole.ok()) << MessageOf(whole.status());
    for (const int64_t rank : {0, 1}) {
      const auto layout = [&](const model::ModelConfig& read) -> StatusOr<model::ParameterStore> {
        return model::ParameterStore(model::ParameterSpecs(read, {rank, 2}));
      };
      const auto part = LoadHfFolder(dir / "in", layout);
      ASSERT_TRUE(part.ok()) << MessageOf(part.status());
      for (const model::ParameterSpec& spec : part->params.specs()) {
        const float* found = part->params.data() + spec.offset;
        EXPECT_EQ(std::vector<float>(found, found + spec.stored), BoxOf(whole->params, spec))
            << spec.name << ", rank " << rank;
      }
    }
  }
}

TEST(LoadHfFolderTest, AFolderWithoutConfigOrWithPicklesSaysSo) {
  const TempDir dir;
  EXPECT_EQ(ErrorCodeOf(LoadHfFolder(dir / "absent").status()), "FILE-MISSING");
  ForeignFolder folder(dir / "in");
  std::filesystem::remove(dir / "in/model.safetensors");
  ASSERT_TRUE(WriteFileAtomically(dir / "in/pytorch_model.bin", "pickle").ok());
  EXPECT_THAT(MessageOf(LoadHfFolder(dir / "in").status()), HasSubstr("pickle"));
  ASSERT_TRUE(WriteFileAtomically(dir / "in/config.json", "{").ok());
  EXPECT_EQ(ErrorCodeOf(LoadHfFolder(dir / "in").status()), "IMP-FIELD");
}

TEST(TokenizerPathForTest, PrefersTheNamedOneThenTheRunThenTheFolder) {
  const TempDir dir;
  const std::string checkpoint = dir / "run/checkpoints/step-000000001";
  ASSERT_TRUE(MakeDirectories(checkpoint).ok());
  ASSERT_TRUE(WriteFileAtomically(checkpoint + "/manifest.json", "{}").ok());
  EXPECT_EQ(*TokenizerPathFor(checkpoint, "bytes"), "bytes");
  EXPECT_EQ(ErrorCodeOf(TokenizerPathFor(checkpoint, "").status()), "EXP-TOKENIZER");
  ASSERT_TRUE(MakeDirectories(dir / "run/tokenizer").ok());
  EXPECT_EQ(std::filesystem::canonical(*TokenizerPathFor(checkpoint + "/", "")),
            std::filesystem::canonical(dir / "run/tokenizer"));
  ASSERT_TRUE(MakeDirectories(dir / "exported").ok());
  ASSERT_TRUE(WriteFileAtomically(dir / "exported/tokenizer.model", "x").ok());
  EXPECT_EQ(*TokenizerPathFor(dir / "exported", ""), dir / "exported");
}

}  // namespace
}  // namespace sala::recipes
