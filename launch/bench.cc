// sala bench: what it measures, and what its reports share.
#include "launch/bench.h"

#include <algorithm>
#include <cstdio>
#include <memory>

#include "core/check.h"
#include "core/config.h"
#include "core/file.h"
#include "core/statistics.h"
#include "launch/build_info.h"
#include "launch/command.h"

namespace sala::launch {
namespace {

model::ModelConfig DefaultBenchModel() {
  model::ModelConfig config;
  config.vocab_size = 4096;
  config.hidden_size = 384;
  config.intermediate_size = 896;
  config.num_hidden_layers = 8;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 2;
  config.head_dim = 64;
  config.tie_word_embeddings = true;
  config.attn_use_rope = false;
  config.attn_use_output_gate = true;
  config.dim_model_base = 64;
  config.scale_emb = 12;
  config.mixer_types.assign(8, "lightning-attn");
  config.mixer_types.front() = "minicpm4";
  config.mixer_types.back() = "minicpm4";
  return config;
}

struct BenchFile {
  model::ModelConfig model;
  void Bind(ConfigBinder& b) { b.Section("model", &model); }
};

void AddModelOptions(CLI::App* command, std::string* config, int* threads, std::string* json) {
  command->add_option(
      "--config", *config,
      "YAML file whose one key is `model`, with the keys it has in a stage; default: a hybrid of "
      "about 15M parameters");
  command->add_option("--threads", *threads, "compute threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--json", *json, "file for all numbers");
}

void AddStepCommand(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<StepBenchOptions>();
  CLI::App* command = AddCommand(
      group, "step",
      "a training step against the matrix products of the same model, those of other libraries "
      "beside them",
      "sala bench step --seq-len 2048 --threads 1 --steps 5");
  AddModelOptions(command, &options->config, &options->threads, &options->json);
  command->add_option("--seq-len", options->seq_len, "tokens of the document")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--steps", options->steps, "measured steps, after one that is not")
      ->check(CLI::Range(int64_t{1}, int64_t{100000}))
      ->capture_default_str();
  command->add_flag("--recompute", options->recompute,
                    "keep layer inputs only and run each layer again backward");
  command->add_flag("--sparse", options->sparse,
                    "block-sparse attention where the document is long enough");
  command->add_flag("!--no-peers", options->peers, "leave out OpenBLAS and oneDNN");
  line.OnUse(command, [options, &line] { return BenchStep(*options, CommandText(line)); });
}

void AddScalingCommand(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<ScalingBenchOptions>();
  for (int64_t n = 1024; n <= 65536; n *= 2) options->lengths.push_back(n);
  options->longest_dense = options->lengths.back();
  CLI::App* command = AddCommand(
      group, "scaling", "time per token of sparse, dense and Lightning attention over the length",
      "sala bench scaling --lengths 1024 2048 4096 --rounds 3");
  AddModelOptions(command, &options->config, &options->threads, &options->json);
  command->add_option("--lengths", options->lengths, "tokens of the document, rising")
      ->check(CLI::Range(int64_t{64}, int64_t{1} << 24))
      ->capture_default_str();
  command
      ->add_option("--longest-dense", options->longest_dense,
                   "dense attention, whose time grows with the square, up to this length")
      ->capture_default_str();
  command
      ->add_option("--rounds", options->rounds,
                   "measurements of each; of one that takes more than ten seconds a single one")
      ->check(CLI::Range(int64_t{1}, int64_t{100000}))
      ->capture_default_str();
  line.OnUse(command, [options, &line] { return BenchScaling(*options, CommandText(line)); });
}

}  // namespace

StatusOr<model::ModelConfig> ReadBenchModel(const std::string& path) {
  BenchFile file;
  file.model = DefaultBenchModel();
  if (!path.empty()) {
    file = BenchFile();
    SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Load(path));
    SALA_RETURN_IF_ERROR(BindConfig(document, &file));
  }
  SALA_RETURN_IF_ERROR(file.model.Resolve());
  return file.model;
}

void PrintOrigin(const std::string& command) {
  std::printf("hardware    %s\n", CpuDescription().c_str());
  std::printf("commit      %s (%s build)\n", Commit().c_str(), BuildType().c_str());
  std::printf("command     %s\n", command.c_str());
}

nlohmann::ordered_json OriginJson(const std::string& command) {
  return {{"hardware", CpuDescription()},
          {"commit", Commit()},
          {"build", BuildType()},
          {"command", command}};
}

void PrintBenchHead(const model::ModelConfig& config, const std::string& command) {
  PrintOrigin(command);
  const auto softmax = std::count(config.mixer_types.begin(), config.mixer_types.end(), "minicpm4");
  std::printf(
      "model       %ld layers (%ld softmax), hidden %ld, MLP %ld, %ld heads of %ld, %ld of keys "
      "and values, vocabulary %ld\n",
      static_cast<long>(config.num_hidden_layers), static_cast<long>(softmax),
      static_cast<long>(config.hidden_size), static_cast<long>(config.intermediate_size),
      static_cast<long>(config.num_attention_heads), static_cast<long>(config.head_dim),
      static_cast<long>(config.num_key_value_heads), static_cast<long>(config.vocab_size));
}

std::string CommandText(const CommandLine& line) {
  std::string text = "sala";
  for (int i = 1; i < line.argc; ++i) text += std::string(" ") + line.argv[i];
  return text;
}

Status TryReport(const std::string& path) {
  if (path.empty()) return OkStatus();
  // Beside it: what an earlier run left there stays until there is something new.
  const std::string probe = path + ".probe";
  SALA_RETURN_IF_ERROR(WriteFileAtomically(probe, ""));
  return RemoveTree(probe);
}

Measured MeasuredOf(const std::vector<double>& values) {
  SALA_CHECK(!values.empty());
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  return {*least, Median(values), *most};
}

void AddBenchCommands(CommandLine& line) {
  CLI::App* group = AddCommand(line.app, "bench", "measurements", "sala bench step --steps 5");
  group->require_subcommand(1);
  AddStepCommand(line, *group);
  AddScalingCommand(line, *group);
  AddBenchHaloCommand(line, *group);
}

}  // namespace sala::launch
