// sala import: a Hugging Face folder as a checkpoint to start from.
#include "recipes/import.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "core/log.h"
#include "launch/command.h"

namespace sala::launch {
namespace {

struct ImportCommand {
  recipes::ImportOptions options;
  bool check = false;
};

void PrintKinds(const recipes::ImportReport& report, bool numbers) {
  size_t width = 4;
  for (const recipes::TensorKindReport& kind : report.kinds)
    width = std::max(width, kind.kind.size());
  std::printf("%-*s %7s %-15s %-5s", static_cast<int>(width), "kind", "tensors", "shape", "dtype");
  std::printf(numbers ? " %11s %10s %10s\n" : "\n", "mean", "std", "absmax");
  for (const recipes::TensorKindReport& kind : report.kinds) {
    std::printf("%-*s %7s %-15s %-5s", static_cast<int>(width), kind.kind.c_str(),
                WithCommas(kind.tensors).c_str(), nlohmann::json(kind.shape).dump().c_str(),
                kind.type.c_str());
    if (numbers)
      std::printf(" %11.4g %10.4g %10.4g", kind.mean, kind.standard_deviation, kind.absolute_max);
    std::printf("\n");
  }
}

Status Import(const ImportCommand& command) {
  const recipes::ImportOptions& options = command.options;
  if (command.check != options.run.empty()) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     command.check ? "--check writes nothing; leave --to out"
                                   : "--to is required, except with --check");
  }
  SALA_ASSIGN_OR_RETURN(const recipes::ImportReport report,
                        command.check ? recipes::CheckFolder(options.directory, options.folder)
                                      : recipes::ImportFolder(options));
  PrintKinds(report, !command.check);
  if (report.rounded > 0) {
    SALA_LOG(Warn) << options.directory << ": " << WithCommas(report.rounded)
                   << " values of float64 tensors are no float32 numbers and were rounded to the "
                      "nearest";
  }
  std::printf("%s: %s, %s tensors, %s parameters%s%s\n", options.directory.c_str(),
              report.model_type.c_str(), WithCommas(report.tensors).c_str(),
              WithCommas(report.parameters).c_str(),
              report.untied ? ", head untied from the embedding" : "",
              report.tokenizer_files.empty() ? ", no tokenizer" : "");
  if (!report.tokenizer_problem.empty()) {
    SALA_LOG(Warn) << report.tokenizer_problem
                   << "; the tokenizer is kept for exports, the model cannot be trained on its "
                      "own tokens";
  }
  std::printf("%s\n", command.check ? "names, shapes and types are those of the configuration"
                                    : (report.checkpoint + ": written and verified").c_str());
  return OkStatus();
}

}  // namespace

void AddImportCommand(CommandLine& line) {
  auto options = std::make_shared<ImportCommand>();
  CLI::App* command =
      AddCommand(line.app, "import", "make a checkpoint of a Hugging Face model folder",
                 "sala import --from models/Qwen3-0.6B --to runs/teacher");
  command->add_option("--from", options->options.directory, "the model folder")->required();
  command->add_option("--to", options->options.run,
                      "run directory to make: checkpoints/step-000000000 and tokenizer");
  command->add_option("--arch", options->options.folder.arch, "the model_type it must have")
      ->check(CLI::IsMember({"auto", "llama", "qwen3", "minicpm", "minicpm_sala"}))
      ->capture_default_str();
  command->add_flag("--keep-tied", options->options.folder.keep_tied,
                    "leave a head that is the embedding one tensor with it");
  command->add_flag("--check", options->check,
                    "hold names, shapes and types against config.json; write nothing");
  line.OnUse(command, [options] { return Import(*options); });
}

}  // namespace sala::launch
