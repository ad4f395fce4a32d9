// sala export: a checkpoint as a folder that inference engines load.
#include <cstdio>
#include <memory>
#include <string>

#include "launch/command.h"
#include "recipes/checkpointing.h"
#include "recipes/export.h"

namespace sala::launch {
namespace {

struct ExportCommand {
  std::string checkpoint;
  std::string tokenizer;
  std::string dtype = "bf16";
  recipes::ExportOptions options;
};

Status Export(ExportCommand command) {
  command.options.dtype = command.dtype == "f32" ? DType::kF32 : DType::kBF16;
  std::unique_ptr<data::Tokenizer> tokenizer;
  if (command.tokenizer != "none") {
    SALA_ASSIGN_OR_RETURN(const std::string path,
                          recipes::TokenizerPathFor(command.checkpoint, command.tokenizer));
    SALA_ASSIGN_OR_RETURN(tokenizer, data::LoadTokenizer(path));
  }
  SALA_ASSIGN_OR_RETURN(const recipes::LoadedModel model, recipes::LoadModel(command.checkpoint));
  nlohmann::json source = model.origin;
  if (model.checkpoint) {
    const CheckpointInfo& info = model.checkpoint->info();
    source["step"] = info.global_step;
    source["stage"] = info.stage;
  }
  command.options.tokenizer_fingerprint = model.tokenizer_fingerprint;
  if (tokenizer != nullptr && !model.tokenizer_fingerprint.empty() &&
      model.tokenizer_fingerprint != tokenizer->fingerprint()) {
    return MakeError(ExitCode::kData, "TOK-MISMATCH",
                     command.checkpoint + ": trained with tokenizer " +
                         model.tokenizer_fingerprint.substr(0, 12) + ", found " +
                         tokenizer->fingerprint().substr(0, 12) +
                         "; name the right one with --tokenizer");
  }
  SALA_ASSIGN_OR_RETURN(
      const recipes::ExportReport report,
      recipes::ExportModel(model.config, model.params, tokenizer.get(), source, command.options));
  std::printf("%s: %s tensors, %s parameters, %s of %s weights%s\n",
              command.options.directory.c_str(), WithCommas(report.tensors).c_str(),
              WithCommas(report.parameters).c_str(), ByteText(report.bytes).c_str(),
              command.dtype.c_str(), report.verified ? ", read back and equal bit for bit" : "");
  return OkStatus();
}

}  // namespace

void AddExportCommand(CommandLine& line) {
  auto options = std::make_shared<ExportCommand>();
  CLI::App* command =
      AddCommand(line.app, "export", "write a model folder that inference engines load",
                 "sala export --ckpt runs/tiny/checkpoints/step-000000100 --to exported --verify");
  command
      ->add_option("--ckpt", options->checkpoint,
                   "checkpoint directory, or a model folder to write again")
      ->required();
  command->add_option("--to", options->options.directory, "directory to make")->required();
  command->add_option("--dtype", options->dtype, "bf16 (rounded to nearest-even) or f32")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  command->add_option("--tokenizer", options->tokenizer,
                      "tokenizer to put in; default: the run's own; none: leave it out");
  command->add_flag("--verify", options->options.verify, "read everything back and compare bits");
  command->add_flag("--force", options->options.force, "replace an exported model that is there");
  line.OnUse(command, [options] { return Export(*options); });
}

}  // namespace sala::launch
