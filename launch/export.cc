// sala export: a checkpoint as a folder that inference engines load.
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/config.h"
#include "core/file.h"
#include "core/log.h"
#include "launch/command.h"
#include "recipes/checkpointing.h"
#include "recipes/export.h"
#include "recipes/model_tokenizer.h"

namespace sala::launch {
namespace {

struct ExportCommand {
  std::string checkpoint;
  std::string shapes_only;
  std::string tokenizer;
  std::string dtype;
  std::string max_shard;
  std::string engine;
  bool print_eval_commands = false;
  recipes::ExportOptions options;
};

// A file of --shapes-only: the model as a stage describes it, and all tokens that end a generation.
struct ModelFile {
  model::ModelConfig model;
  std::vector<int64_t> stop_token_ids;
  void Bind(ConfigBinder& b) {
    b.Section("model", &model);
    b.Field("stop_token_ids", &stop_token_ids, {.min = 0});
  }
};

std::string Listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "nothing" : text;
}

void Print(const ExportCommand& command, const recipes::ExportReport& report) {
  const bool shapes = !command.shapes_only.empty();
  std::printf("%s: %s tensors, %s parameters, %s of %s weights%s%s%s\n",
              command.options.directory.c_str(), WithCommas(report.tensors).c_str(),
              WithCommas(report.parameters).c_str(), ByteText(report.bytes).c_str(),
              std::string(NameOf(report.dtype)).c_str(),
              shapes ? ", shapes only: the values are holes" : "",
              report.as_source ? ", in the form of the folder it came from" : "",
              report.verified ? ", read back and equal bit for bit" : "");
  if (!report.source_problem.empty())
    std::printf("not in the form of the folder it came from: %s\n", report.source_problem.c_str());
  if (!command.options.base.empty()) {
    std::printf("taken from %s: %s\n", command.options.base.c_str(), Listed(report.taken).c_str());
    if (!report.left_out.empty())
      std::printf("left out, %s: %s\n",
                  command.tokenizer == "none" ? "with the tokenizer" : "of another tokenizer",
                  Listed(report.left_out).c_str());
  }
  if (command.options.engine) {
    std::printf("%s\n", recipes::LoadCommand(*command.options.engine, command.options.directory,
                                             report.config)
                            .c_str());
  }
}

// A run takes them from its tokenizer; here is none.
Status CheckTokenIds(const std::string& path, const model::ModelConfig& config) {
  std::string missing;
  for (const auto& [key, id] : {std::make_pair("bos_token_id", config.bos_token_id),
                                std::make_pair("eos_token_id", config.eos_token_id),
                                std::make_pair("pad_token_id", config.pad_token_id)}) {
    if (id < 0) missing += (missing.empty() ? "model." : ", model.") + std::string(key);
  }
  if (missing.empty()) return OkStatus();
  return MakeError(ExitCode::kConfig, "CFG-MISSING",
                   Printable(path) + ": " + missing +
                       ": missing; the folder's config.json needs them, and --shapes-only has no "
                       "tokenizer to take them from");
}

Status ExportShapes(const ExportCommand& command) {
  if (!command.tokenizer.empty() || command.options.verify || command.options.engine ||
      !command.options.base.empty() || command.print_eval_commands) {
    return MakeError(
        ExitCode::kUsage, "USAGE",
        "--shapes-only writes no values and no tokenizer; leave --verify, --tokenizer, "
        "--engine, --base and --print-eval-commands out");
  }
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Load(command.shapes_only));
  ModelFile file;
  SALA_RETURN_IF_ERROR(BindConfig(document, &file));
  if (const Status resolved = file.model.Resolve(); !resolved.ok())
    return Annotate(resolved, command.shapes_only);
  SALA_RETURN_IF_ERROR(CheckTokenIds(command.shapes_only, file.model));
  SALA_ASSIGN_OR_RETURN(const recipes::ExportReport report,
                        recipes::ExportShapes(file.model, file.stop_token_ids, command.options));
  Print(command, report);
  return OkStatus();
}

// The tokenizer of the export, and where its files are. Null without one: --tokenizer none, or a
// model from a folder whose tokenizer is of a form that is not read, or that had none.
StatusOr<std::unique_ptr<data::Tokenizer>> FindTokenizer(
    ExportCommand& command, const std::optional<recipes::SourceRecord>& source) {
  std::unique_ptr<data::Tokenizer> tokenizer;
  if (command.tokenizer == "none") return tokenizer;
  const auto path = recipes::TokenizerPathFor(command.checkpoint, command.tokenizer);
  if (!path.ok()) {
    if (source && command.tokenizer.empty() && ErrorCodeOf(path.status()) == "EXP-TOKENIZER" &&
        (source->tokenizer_files.empty() || recipes::IsHfFolder(command.checkpoint))) {
      command.options.tokenizer_directory =
          source->tokenizer_files.empty() ? "" : command.checkpoint;
      return tokenizer;
    }
    return path.status();
  }
  if (command.tokenizer.empty() && IsDirectory(*path)) command.options.tokenizer_directory = *path;
  auto loaded = data::LoadTokenizer(*path);
  if (loaded.ok()) return std::move(loaded).value();
  if (source && !command.options.tokenizer_directory.empty() &&
      (ErrorCodeOf(loaded.status()) == "TOK-MISSING" ||
       ErrorCodeOf(loaded.status()) == "TOK-UNSUPPORTED" ||
       ErrorCodeOf(loaded.status()) == "TOK-FORMAT"))
    return tokenizer;
  return loaded.status();
}

// Whether a checkpoint's stage trained on chats.
struct KindKey {
  std::string kind;
  void Bind(ConfigBinder& b) { b.Field("kind", &kind); }
};

StatusOr<bool> LearnedChats(const Checkpoint& checkpoint) {
  KindKey key;
  SALA_ASSIGN_OR_RETURN(const std::string yaml, checkpoint.ReadConfig());
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document,
                        ConfigDocument::Parse(yaml, checkpoint.directory() + "/config.yaml"));
  static_cast<void>(BindConfig(document, &key));  // complains of all the other keys
  return key.kind == "sft";
}

Status Export(ExportCommand command) {
  command.options.engine = recipes::ParseEngine(command.engine);
  if (!command.dtype.empty()) command.options.dtype = recipes::ParseWeightType(command.dtype);
  if (!command.max_shard.empty()) {
    const std::optional<int64_t> bytes = ParseInteger(command.max_shard);
    if (!bytes || *bytes < 1)
      return MakeError(ExitCode::kUsage, "USAGE",
                       "--max-shard " + command.max_shard + " is not a number of bytes");
    command.options.max_shard_bytes = *bytes;
  }
  if (command.checkpoint.empty() == command.shapes_only.empty())
    return MakeError(ExitCode::kUsage, "USAGE", "give --ckpt or --shapes-only, one of the two");
  if (!command.shapes_only.empty()) return ExportShapes(command);
  SALA_ASSIGN_OR_RETURN(const std::optional<recipes::SourceRecord> record,
                        recipes::SourceRecordAt(command.checkpoint));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        FindTokenizer(command, record));
  SALA_ASSIGN_OR_RETURN(const recipes::LoadedModel model, recipes::LoadModel(command.checkpoint));
  nlohmann::json source = model.origin;
  if (model.checkpoint) {
    const CheckpointInfo& info = model.checkpoint->info();
    source["step"] = info.global_step;
    source["stage"] = info.stage;
    SALA_ASSIGN_OR_RETURN(command.options.chat, LearnedChats(*model.checkpoint));
  }
  command.options.tokenizer_fingerprint = model.tokenizer_fingerprint;
  if (tokenizer != nullptr) {
    SALA_RETURN_IF_ERROR(
        recipes::CheckTokenizer(command.checkpoint, model.tokenizer_fingerprint, *tokenizer));
  }
  command.options.source_form = record ? &*record : nullptr;
  if (command.print_eval_commands) {  // what cannot be printed shows before anything is written
    SALA_RETURN_IF_ERROR(recipes::EvalCommands(command.options.engine, command.options.directory,
                                               nlohmann::json::object())
                             .status());
  }
  SALA_ASSIGN_OR_RETURN(
      const recipes::ExportReport report,
      recipes::ExportModel(model.config, model.params, tokenizer.get(), source, command.options));
  if (report.as_source && !command.max_shard.empty()) {
    SALA_LOG(Warn) << command.options.directory
                   << ": --max-shard was ignored: the weights are cut into files as in the folder "
                      "the model came from";
  }
  Print(command, report);
  if (!command.print_eval_commands) return OkStatus();
  SALA_ASSIGN_OR_RETURN(
      const std::vector<std::string> commands,
      recipes::EvalCommands(command.options.engine, command.options.directory, report.config));
  for (const std::string& each : commands) std::printf("%s\n", each.c_str());
  return OkStatus();
}

}  // namespace

void AddExportCommand(CommandLine& line) {
  auto options = std::make_shared<ExportCommand>();
  CLI::App* command =
      AddCommand(line.app, "export", "write a model folder that inference engines load",
                 "sala export --ckpt runs/tiny/checkpoints/step-000000380 --to exported --verify");
  command->add_option("--ckpt", options->checkpoint,
                      "checkpoint directory, or a model folder to write again");
  command->add_option("--shapes-only", options->shapes_only,
                      "in place of --ckpt: a YAML file with a model; writes true headers and file "
                      "sizes with holes for values");
  command->add_option("--to", options->options.directory, "directory to make")->required();
  command
      ->add_option("--dtype", options->dtype,
                   "number type, rounded to nearest-even; default: of the folder the model came "
                   "from, else bf16")
      ->check(CLI::IsMember({"bf16", "f16", "f32", "f64"}));
  command->add_option("--max-shard", options->max_shard,
                      "bytes of a file at most; default 5,000,000,000; a model in the form of the "
                      "folder it came from keeps that folder's files");
  command->add_option("--tokenizer", options->tokenizer,
                      "tokenizer to put in; default: the run's own; none: leave it out");
  command
      ->add_option("--engine", options->engine,
                   "check that this program loads the folder, and print the command that does: hf "
                   "(transformers), sglang, vllm")
      ->check(CLI::IsMember({"hf", "sglang", "vllm"}));
  command->add_option("--base", options->options.base,
                      "model folder whose code, licence and other small files are put in where "
                      "there is none of that name");
  command->add_flag("--print-eval-commands", options->print_eval_commands,
                    "print commands that evaluate the folder");
  command->add_flag("--verify", options->options.verify, "read everything back and compare bits");
  command->add_flag("--force", options->options.force,
                    "replace an exported model that is there; everything in its folder goes");
  line.OnUse(command, [options] { return Export(*options); });
}

}  // namespace sala::launch
