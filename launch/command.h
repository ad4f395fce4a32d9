// How a subcommand is declared: each group adds its options to the command line and says what to
// run once all were parsed.
//
//   void AddExportCommand(CommandLine& line) {
//     auto options = std::make_shared<Options>();
//     CLI::App* command = AddCommand(line.app, "export", "write a model folder", "sala export
//     --ckpt DIR --to OUT"); command->add_option("--to", options->to, "new directory")->required();
//     line.OnUse(command, [options] { return Run(*options); });
//   }
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <string>

#include "core/status.h"

namespace sala::data {
struct IngestOptions;
}

namespace sala::launch {

struct CommandLine {
  CLI::App app{"Trains, converts and exports hybrids of sparse attention and linear attention.",
               "sala"};
  std::function<Status()> action;  // of the subcommand that was named
  int argc = 0;
  char** argv = nullptr;
  bool print_error = true;  // false where the error is printed already, here or on another rank

  void OnUse(CLI::App* command, std::function<Status()> run) {
    command->callback([this, run = std::move(run)] { action = run; });
  }
};

// A subcommand whose --help ends with an example.
CLI::App* AddCommand(CLI::App& parent, const std::string& name, const std::string& description,
                     const std::string& example);

void AddTrainCommand(CommandLine& line);
void AddVerifyCommand(CommandLine& line);
void AddDataCommands(CommandLine& line);
void AddDataPlanCommands(CommandLine& line, CLI::App& group);  // plan, trace, render
void AddChatOptions(CLI::App* command, data::IngestOptions* options);
void AddTokenizerCommands(CommandLine& line);
void AddCheckpointCommands(CommandLine& line);
void AddExportCommand(CommandLine& line);
void AddImportCommand(CommandLine& line);
void AddGenerateCommand(CommandLine& line);
void AddEvalCommand(CommandLine& line);
void AddLogitsCommand(CommandLine& line);
void AddBenchCommands(CommandLine& line);
void AddBenchHaloCommand(CommandLine& line, CLI::App& group);
void AddPlanCommand(CommandLine& line);
void AddReportCommand(CommandLine& line);
void AddDoctorCommand(CommandLine& line);
void AddExplainFaultCommand(CommandLine& line);
void AddCompletionCommand(CommandLine& line);

// "sala: error: CODE: text" on stderr.
void PrintError(const Status& status);

std::string WithCommas(int64_t value);  // 1,234,567
std::string ByteText(int64_t bytes);    // "1.5 GiB"
std::string Format(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace sala::launch
