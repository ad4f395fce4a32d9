// sala eval: measures what a model recalls from long context, alone or on many ranks; and compares
// two evaluations.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "data/data_config.h"
#include "launch/command.h"
#include "launch/ranks.h"
#include "launch/sparse_rule.h"
#include "parallel/mesh.h"
#include "recipes/checkpointing.h"
#include "recipes/eval.h"
#include "recipes/eval_compare.h"
#include "recipes/eval_files.h"
#include "recipes/model_tokenizer.h"
#include "recipes/rank_device.h"

namespace sala::launch {
namespace {

struct EvalOptions {
  std::string model, against, to, tokenizer;
  recipes::EvalRequest request;
  std::optional<double> held_out_fraction;
  std::optional<int64_t> held_out_seed;
  std::string sparse = "auto";
  std::string device = "cpu";
  int threads = 1;
  int64_t cp = 1, tp = 1;
  bool json = false, force = false;
  std::string first, second;  // of compare
};

// The keys of a stage's configuration that say what was held out.
struct HeldOutKeys {
  data::DataConfig data;
  void Bind(ConfigBinder& b) { b.Section("data", &data); }
};

// Of a haystack only what the model was not trained on is used: as the checkpoint's stage says,
// unless the command line does.
StatusOr<std::optional<data::Haystack::Part>> HeldOutPart(const EvalOptions& options) {
  HeldOutKeys keys;
  if (PathExists(options.model + "/manifest.json")) {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options.model));
    SALA_ASSIGN_OR_RETURN(const std::string yaml, checkpoint.ReadConfig());
    SALA_ASSIGN_OR_RETURN(const ConfigDocument document,
                          ConfigDocument::Parse(yaml, options.model + "/config.yaml"));
    static_cast<void>(BindConfig(document, &keys));  // complains of all the other keys
  }
  const double fraction = options.held_out_fraction.value_or(keys.data.validation.fraction);
  const int64_t seed = options.held_out_seed.value_or(keys.data.seed);
  if (fraction <= 0) return std::nullopt;
  return data::Haystack::Part{data::Split::kHeldOut, seed, fraction};
}

// What is complete is not made again. An evaluation that was cut off goes on (EvalWriter).
Status CheckTarget(const EvalOptions& options, const std::string& directory) {
  if (recipes::StateOf(directory) == recipes::EvalState::kForeign)
    return recipes::ForeignError(directory);
  if (options.force || recipes::StateOf(directory) != recipes::EvalState::kComplete)
    return OkStatus();
  return MakeError(ExitCode::kIo, "EVAL-EXISTS",
                   Printable(directory) +
                       ": holds an evaluation; name another directory, or --force replaces it");
}

Status Print(const EvalOptions& options, const std::vector<nlohmann::ordered_json>& lines,
             const std::string& table) {
  if (options.json) {
    for (const nlohmann::ordered_json& line : lines) std::printf("%s\n", DumpJson(line).c_str());
  } else {
    std::printf("%s", table.c_str());
  }
  std::fflush(stdout);
  return OkStatus();
}

// The evaluation that is in the directory.
Status PrintEvaluation(const EvalOptions& options, const std::string& path,
                       const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const auto summary, recipes::ReadSummary(directory));
  if (!options.json) std::printf("%s (%s)\n", path.c_str(), directory.c_str());
  return Print(options, summary, recipes::EvaluationTable(summary));
}

// Whether the model goes with the tokenizer and the device. TOK-VOCAB (65), CFG-MODEL (78).
Status CheckModel(const Context& ctx, const parallel::Mesh& mesh, const model::ModelConfig& model,
                  const data::Tokenizer& tokenizer, const std::string& tokenizer_path) {
  if (tokenizer.vocab_size() > model.vocab_size) {
    return MakeError(ExitCode::kData, "TOK-VOCAB",
                     Printable(tokenizer_path) + ": has " + std::to_string(tokenizer.vocab_size()) +
                         " tokens, the model " + std::to_string(model.vocab_size) +
                         "; name the tokenizer the model was trained with");
  }
  const std::string problem = model.Local({mesh.tp_rank(), mesh.tp_size()}).CudaProblem();
  if (!ctx.cuda() || problem.empty()) return OkStatus();
  return MakeError(ExitCode::kConfig, "CFG-MODEL", problem + "; use --device cpu");
}

// One model, into one directory, on the device or, where it is null, on the CPU. With `keep` an
// evaluation that is complete and has the same settings is not made again. Collective.
Status EvaluateModel(parallel::Communicator& world, Device* device, const EvalOptions& options,
                     const std::string& path, const std::string& directory, bool keep) {
  const bool root = world.rank() == 0;
  SALA_RETURN_IF_ERROR(
      parallel::AgreeOnStatus(world, root && !keep ? CheckTarget(options, directory) : OkStatus()));
  ThreadPool pool(options.threads);
  Arena arena(kArenaBlockBytes, device);
  Arena scratch(kArenaBlockBytes, device);
  Context ctx{.pool = &pool, .scratch = &scratch};
  if (device != nullptr) {
    ctx.device = DeviceKind::kCuda;
    ctx.gpu = device;
  }
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<parallel::Mesh> mesh,
                        parallel::Mesh::Create(world, {.cp = options.cp, .tp = options.tp}, ctx));
  StatusOr<std::unique_ptr<data::Tokenizer>> tokenizer = nullptr;
  StatusOr<recipes::Evaluation> evaluation = MakeError(ExitCode::kInternal, "INTERNAL", "");
  StatusOr<recipes::LoadedModel> loaded = MakeError(ExitCode::kInternal, "INTERNAL", "");
  bool sparse = false;
  const auto open = [&]() -> Status {
    SALA_ASSIGN_OR_RETURN(const std::string tokenizer_path,
                          recipes::TokenizerPathFor(path, options.tokenizer));
    tokenizer = data::LoadTokenizer(tokenizer_path);
    SALA_RETURN_IF_ERROR(tokenizer.status());
    evaluation = recipes::Evaluation::Open(options.request, **tokenizer);
    SALA_RETURN_IF_ERROR(evaluation.status());
    loaded = recipes::LoadModel(path, recipes::LayoutOn(*mesh));
    SALA_RETURN_IF_ERROR(loaded.status());
    SALA_RETURN_IF_ERROR(recipes::CheckTokenizer(path, loaded->tokenizer_fingerprint, **tokenizer));
    SALA_RETURN_IF_ERROR(CheckModel(ctx, *mesh, loaded->config, **tokenizer, tokenizer_path));
    SALA_ASSIGN_OR_RETURN(sparse, UseSparseAttention(options.sparse, path, *loaded));
    return OkStatus();
  };
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, open()));
  model::ComputeParameters parameters(ctx, loaded->params, mesh.get());
  const model::Model model(loaded->config, parameters.store(), model::Spread(*mesh));
  recipes::EvalTarget target = {
      .directory = directory,
      .depths = options.request.config.depths,
      .identity = {.step = loaded->checkpoint ? loaded->checkpoint->info().global_step : -1,
                   .checkpoint = path},
      .replace = options.force};
  int64_t complete = 0;
  const auto prepare = [&]() -> Status {
    SALA_ASSIGN_OR_RETURN(target.settings, recipes::EvalSettings(options.request, **tokenizer,
                                                                 {.model_path = path,
                                                                  .sparse_attention = sparse,
                                                                  .cp = options.cp,
                                                                  .tp = options.tp,
                                                                  .device = options.device}));
    // A pair is measured on one device: between two the same model differs by roundings.
    const bool kept = keep && recipes::IsCompleteWith(directory, target.settings) &&
                      recipes::ReadSettings(directory)["device"] == options.device;
    complete = kept ? 1 : 0;
    // The second of a pair whose first is now replaced.
    const std::string second = directory + "/against";
    const bool stale = keep && complete == 0 && options.force &&
                       recipes::StateOf(second) != recipes::EvalState::kNothing;
    return stale ? recipes::RemoveEvaluation(second) : OkStatus();
  };
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, root ? prepare() : OkStatus()));
  SALA_RETURN_IF_ERROR(world.AllReduce(std::span<int64_t>(&complete, 1), parallel::Reduce::kMax));
  if (complete == 0) {
    SALA_RETURN_IF_ERROR(recipes::MakeEvaluation(
        *mesh, *evaluation, recipes::ScoreWith(ctx, arena, model, {.sparse_attention = sparse}),
        target));
  }
  return parallel::AgreeOnStatus(world,
                                 root ? PrintEvaluation(options, path, directory) : OkStatus());
}

Status Compare(const EvalOptions& options) {
  SALA_ASSIGN_OR_RETURN(const auto lines, recipes::CompareEvaluations(options.first, options.second,
                                                                      options.request.config.seed));
  return Print(options, lines, recipes::ComparisonTable(lines));
}

Status Evaluate(parallel::Communicator& world, EvalOptions options) {
  const auto part = HeldOutPart(options);
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, part.status()));
  options.request.part = *part;
  // A pair of which the first was made and the second was not goes on with the second, also one
  // that replaces another.
  bool keep = false;
  if (!options.against.empty()) {
    keep =
        options.force || recipes::StateOf(options.to + "/against") != recipes::EvalState::kComplete;
    // Found out now, not after the first model was measured.
    const auto second = [&]() -> Status {
      SALA_RETURN_IF_ERROR(recipes::ModelConfigAt(options.against).status());
      SALA_ASSIGN_OR_RETURN(const std::string fingerprint,
                            recipes::TokenizerFingerprintAt(options.against));
      SALA_ASSIGN_OR_RETURN(const std::string tokenizer_path,
                            recipes::TokenizerPathFor(options.against, options.tokenizer));
      SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                            data::LoadTokenizer(tokenizer_path));
      SALA_RETURN_IF_ERROR(recipes::CheckTokenizer(options.against, fingerprint, *tokenizer));
      return CheckTarget(options, options.to + "/against");
    };
    SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, world.rank() == 0 ? second() : OkStatus()));
  }
  std::unique_ptr<Device> device;
  if (options.device == "cuda") {
    SALA_ASSIGN_OR_RETURN(device, recipes::OpenRankDevice(world));
  }
  SALA_RETURN_IF_ERROR(
      EvaluateModel(world, device.get(), options, options.model, options.to, keep));
  if (options.against.empty()) return OkStatus();
  options.first = options.to;
  options.second = options.to + "/against";
  SALA_RETURN_IF_ERROR(
      EvaluateModel(world, device.get(), options, options.against, options.second, false));
  if (world.rank() == 0 && !options.json)
    std::printf("\na: %s\nb: %s\n", options.model.c_str(), options.against.c_str());
  return parallel::AgreeOnStatus(world, world.rank() == 0 ? Compare(options) : OkStatus());
}

Status Usage(const std::string& text) {
  return MakeError(ExitCode::kUsage, "USAGE", text + "; see `sala eval --help`");
}

Status Run(CommandLine& line, EvalOptions options) {
  if (options.model.empty()) return Usage("--ckpt is required");
  if (options.to.empty()) return Usage("--to is required");
  const recipes::EvalConfig& config = options.request.config;
  if (config.tasks.empty() && options.request.prompts.empty())
    return Usage("name --tasks, --prompts or both");
  if (!config.tasks.empty() && config.lengths_tokens.empty())
    return Usage("--tasks needs --lengths");
  if (recipes::HasRepeats(config.tasks)) return Usage("--tasks names a task twice");
  if (recipes::HasRepeats(config.lengths_tokens)) return Usage("--lengths names a length twice");
  return OnAllRanks(line,
                    [&options](parallel::Communicator& world) { return Evaluate(world, options); });
}

void AddCompare(CLI::App& command, EvalOptions& options) {
  CLI::App* compare =
      AddCommand(command, "compare", "the difference of two evaluations of the same prompts",
                 "sala eval compare evaluations/before evaluations/after");
  compare->add_option("a", options.first, "directory of an evaluation")->required();
  compare->add_option("b", options.second, "another one")->required();
  compare->add_option("--seed", options.request.config.seed, "of the resamples")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  compare->add_flag("--json", options.json, "a JSON object a line instead of a table");
}

}  // namespace

void AddEvalCommand(CommandLine& line) {
  auto options = std::make_shared<EvalOptions>();
  recipes::EvalConfig& config = options->request.config;
  CLI::App* command = AddCommand(
      line.app, "eval", "measure recall from long context; under mpirun on many ranks",
      "sala eval --ckpt runs/tiny/checkpoints/step-000000380 --tasks passkey,niah_single_1 "
      "--lengths 512,1024 --to evaluations/tiny\n"
      "  sala eval --ckpt exported --tasks kv --lengths 32768 --to evaluations/kv --device cuda");
  command->require_subcommand(0, 1);
  command->add_option("--ckpt", options->model, "checkpoint directory or model folder");
  command->add_option("--against", options->against,
                      "another one: the same prompts, and the difference");
  command->add_option("--to", options->to, "directory to make");
  command->add_option("--tasks", config.tasks, "names with commas between (docs/evaluation.md)")
      ->delimiter(',');
  command->add_option("--lengths", config.lengths_tokens, "tokens of a whole prompt with answer")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command->add_option("--samples", config.samples, "of each task at each length")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--depths", config.depths, "parts of the context in the table of depths")
      ->check(CLI::Range(1, 40))
      ->capture_default_str();
  command->add_option("--seed", config.seed, "of the prompts")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--prompts", options->request.prompts,
                      "JSON lines of your own: prompt, answer, and perhaps id and group");
  command->add_option("--haystack", config.haystack,
                      "token store of text that needles stand in and losses are measured on");
  command
      ->add_option("--held-out-fraction", options->held_out_fraction,
                   "of the haystack only what data.validation.fraction holds out; 0: all of it; "
                   "default: as the checkpoint's stage")
      ->check(CLI::Range(0.0, 0.999));
  command
      ->add_option("--held-out-seed", options->held_out_seed, "likewise: data.seed of the training")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--chat", config.chat, "prompts as a user's turn of a chat (ChatML)");
  command->add_option("--tokenizer", options->tokenizer,
                      "default: the run's own, or the one in the folder");
  command
      ->add_option("--sparse", options->sparse,
                   "block-sparse attention for long prompts: auto (as trained), on, off")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command
      ->add_option("--device", options->device,
                   "cpu, or cuda: each rank computes in bfloat16 on a GPU of its host")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--cp", options->cp, "ranks that share the tokens of a prompt")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--tp", options->tp, "ranks that share the heads of the model")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--threads", options->threads, "compute threads of each rank")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_flag("--json", options->json, "a JSON object a line instead of tables");
  command->add_flag(
      "--force", options->force,
      "replace an evaluation that is there; one that was cut off with the same options goes on");
  AddCompare(*command, *options);
  line.OnUse(command, [options, command, &line] {
    return command->get_subcommands().empty() ? Run(line, *options) : Compare(*options);
  });
}

}  // namespace sala::launch
