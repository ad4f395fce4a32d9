#include "tests/fuzz/targets.h"

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>

#include "core/checkpoint.h"
#include "core/config.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/safetensors_header.h"
#include "data/token_shard.h"
#include "data/token_store.h"
#include "tests/core/temp_dir.h"

namespace sala::fuzz {
namespace {

void Write(const std::string& path, std::string_view bytes) {
  // A new file each time: ext4 flushes one that is cut and written again.
  std::filesystem::remove(path);
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// The eight digits behind the last "self_crc32c" made right, as far as there are any: without this
// nothing but the checksum would ever be tested.
std::string Sealed(std::string_view input) {
  std::string text(input);
  const std::string key = "\"self_crc32c\": \"";
  const size_t at = text.rfind(key);
  if (at == std::string::npos || at + key.size() + 8 > text.size()) return text;
  text.replace(at + key.size(), 8, "00000000");
  const std::string crc = Hex32(Crc32c(text.data(), text.size()));
  text.replace(at + key.size(), 8, crc);
  return text;
}

// ---- safetensors ----

std::string Safetensors(const std::string& header, size_t data_bytes) {
  std::string bytes(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  return bytes + header + std::string(data_bytes, '\1');
}

std::vector<std::string> SafetensorsSeeds() {
  return {
      Safetensors("{}", 0),
      Safetensors(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})", 24),
      Safetensors(R"({"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[1,2],)"
                  R"("data_offsets":[0,4]},"b":{"dtype":"I64","shape":[],"data_offsets":[4,12]}})",
                  12)};
}

bool RunSafetensors(std::string_view input) { return ParseSafetensorsHeader(input).ok(); }

// ---- configuration ----

struct Inner {
  int64_t count = 0;
  std::optional<double> rate;
  void Bind(ConfigBinder& b) {
    b.Field("count", &count, {.min = 0, .max = 1000});
    b.Field("rate", &rate);
  }
};

struct Outer {
  std::string name;
  bool on = false;
  std::vector<int64_t> sizes;
  std::vector<std::string> words;
  Inner inner;
  std::optional<Inner> maybe;
  std::vector<Inner> list;
  void Bind(ConfigBinder& b) {
    b.Field("name", &name, {.required = true});
    b.Field("on", &on);
    b.Field("sizes", &sizes);
    b.Field("words", &words);
    b.Section("inner", &inner);
    b.Section("maybe", &maybe);
    b.List("list", &list);
  }
};

std::vector<std::string> ConfigSeeds() {
  return {"name: a\n",
          "# all there is\nname: \"q\\u00e9\"\non: true\nsizes: [1, 4K, 2_000]\nwords:\n  - a\n  - "
          "'b'\n"
          "inner: {count: 3, rate: 1e-3}\nmaybe: null\nlist:\n  - count: 1\n  - {count: 2, rate: "
          ".5}\n"};
}

bool RunConfig(std::string_view input) {
  const auto document = ConfigDocument::Parse(std::string(input), "fuzz.yaml");
  if (!document.ok()) return false;
  Outer outer;
  return BindConfig(*document, &outer).ok();
}

// ---- checkpoint manifest ----

// A small checkpoint whose manifest is replaced by the input.
class CheckpointFolder {
 public:
  CheckpointFolder() {
    const std::vector<float> values = {1, 2, 3, 4, 5, 6};
    auto commit = CheckpointCommit::Begin(root_.path(), 3, 1000).value();
    auto written =
        WriteCheckpointSlices(
            commit.directory(), 0, commit.save_id(),
            {{.name = "w", .shape = {2, 3}, .data = values.data()},
             {.name = "w", .kind = TensorKind::kExpAvg, .shape = {2, 3}, .data = values.data()}})
            .value();
    CheckpointInfo info;
    info.global_step = 3;
    info.stage = {{"name", "a"}, {"index", 0}, {"step", 3}, {"final", false}};
    info.program = {{"version", "0"}};
    info.topology = {{"world", 1}, {"dp", 1}, {"tp", 1}, {"cp", 1}, {"zero_stage", 0}};
    info.model = {{"config_sha256", ""}, {"parameters", 6}, {"tensors", 1}};
    info.trainer = nlohmann::json::object();
    directory_ = commit.Finish(info, {written}, "name: a\n").value();
    manifest_ = ReadFile(directory_ + "/manifest.json").value();
  }
  const std::string& directory() const { return directory_; }
  const std::string& manifest() const { return manifest_; }

 private:
  TempDir root_;
  std::string directory_, manifest_;
};

const CheckpointFolder& TheCheckpoint() {
  static const CheckpointFolder folder;
  return folder;
}

std::vector<std::string> ManifestSeeds() { return {TheCheckpoint().manifest()}; }

bool RunManifest(std::string_view input) {
  const std::string& directory = TheCheckpoint().directory();
  Write(directory + "/manifest.json", Sealed(input));
  const auto checkpoint = Checkpoint::Open(directory);
  return checkpoint.ok() && checkpoint->Verify(VerifyLevel::kDeep).ok();
}

// ---- token store ----

const TempDir& TheStoreFolder() {
  static const TempDir folder;
  return folder;
}

std::vector<std::string> ShardSeeds() {
  std::vector<std::string> seeds;
  for (const bool sft : {false, true}) {
    data::ShardContent content{.tokens = {5, 6, 7, 8, 9},
                               .doc_offsets = {0, 2, 5},
                               .doc_source = {0, 0},
                               .doc_hash = {11, 12},
                               .loss_mask = {}};
    if (sft) content.loss_mask = {0, 1, 0, 1, 1};
    const std::string path = TheStoreFolder() / "seed.h5";
    const Status status = data::WriteShard(path, content,
                                           {.kind = sft ? "sft" : "pretrain",
                                            .tokenizer_fingerprint = std::string(64, 'a'),
                                            .vocab_size = 261});
    if (status.ok()) seeds.push_back(ReadFile(path).value());
  }
  return seeds;
}

bool RunShard(std::string_view input) {
  const std::string path = TheStoreFolder() / "tokens-00000.h5";
  Write(path, input);
  const auto layout = data::ReadShardLayout(path);
  if (!layout.ok()) return false;
  // What dataset.json would have to say for the file to be opened at all.
  data::DatasetInfo info;
  info.directory = TheStoreFolder().path();
  info.kind = layout->header.kind;
  info.vocab_size = layout->header.vocab_size;
  info.tokenizer_fingerprint = layout->header.tokenizer_fingerprint;
  data::DatasetFile entry;
  entry.name = "tokens-00000.h5";
  entry.bytes = static_cast<int64_t>(input.size());
  entry.documents = layout->header.documents;
  entry.tokens = layout->header.tokens;
  info.files = {entry};
  const auto file = data::TokenFile::Open(info, 0, data::Verify::kFirstTouch);
  return file.ok() && (*file)->VerifyAll().ok();
}

std::vector<std::string> DatasetSeeds() {
  const data::ShardContent content{.tokens = {5, 6, 7, 8, 9},
                                   .doc_offsets = {0, 2, 5},
                                   .doc_source = {0, 0},
                                   .doc_hash = {11, 12},
                                   .loss_mask = {}};
  const TempDir folder;
  const auto tokenizer = data::MakeByteTokenizer();
  auto writer = data::TokenStoreWriter::Create(
                    {.directory = folder / "set", .name = "set", .sft = false}, *tokenizer)
                    .value();
  const int64_t source = writer->AddSource("a", "CC0-1.0", "");
  writer->Add({.tokens = content.tokens, .loss_mask = {}, .hash = 1, .source = source})
      .IgnoreError();
  if (!writer->Finish(nlohmann::json::object()).ok()) return {};
  return {ReadFile(folder / "set/dataset.json").value()};
}

bool RunDataset(std::string_view input) {
  Write(TheStoreFolder() / "dataset.json", Sealed(input));
  return data::TokenStore::Open(TheStoreFolder().path()).ok();
}

}  // namespace

const std::vector<Target>& Targets() {
  static const std::vector<Target> targets = {
      {"safetensors", SafetensorsSeeds, RunSafetensors},
      {"config", ConfigSeeds, RunConfig},
      {"manifest", ManifestSeeds, RunManifest},
      {"shard", ShardSeeds, RunShard},
      {"dataset", DatasetSeeds, RunDataset},
  };
  return targets;
}

}  // namespace sala::fuzz
