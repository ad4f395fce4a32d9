// The program: parses the command line, runs one subcommand, turns its status into one line and an
// exit code.
#include <cstdio>
#include <exception>
#include <string>

#include "launch/build_info.h"
#include "launch/command.h"

namespace {

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

int Run(int argc, char** argv) {
  using sala::launch::CommandLine;
  CommandLine line;
  line.argc = argc;
  line.argv = argv;
  line.app.set_version_flag("--version", "sala " + sala::launch::Version() + " (" +
                                             sala::launch::Commit() + ", " +
                                             sala::launch::BuildType() + ")");
  line.app.require_subcommand(1);
  line.app.footer(
      "Each subcommand has --help with an example. Exit codes and error codes: docs/errors.md");
  sala::launch::AddTrainCommand(line);
  sala::launch::AddDataCommands(line);
  sala::launch::AddTokenizerCommands(line);
  sala::launch::AddCheckpointCommands(line);
  sala::launch::AddExportCommand(line);
  sala::launch::AddGenerateCommand(line);
  sala::launch::AddBenchCommands(line);
  try {
    line.app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success))
      return line.app.exit(error);  // --help, --version
    std::fprintf(stderr, "sala: error: USAGE: %s; see `sala --help` or `sala COMMAND --help`\n",
                 FirstLine(error.what()).c_str());
    return static_cast<int>(sala::ExitCode::kUsage);
  }
  const sala::Status status = line.action();
  if (status.ok()) return 0;
  if (line.print_error) sala::launch::PrintError(status);
  return static_cast<int>(sala::ExitCodeOf(status));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "sala: error: INTERNAL: %s; this is a defect of the program\n",
                 error.what());
    return static_cast<int>(sala::ExitCode::kInternal);
  }
}
