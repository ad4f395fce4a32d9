// The program: parses the command line, runs one subcommand, turns its status into one line and an
// exit code.
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "core/exception.h"
#include "core/file.h"
#include "core/memory.h"
#include "core/terminal.h"
#include "kernels/common/instruction_set.h"
#include "launch/build_info.h"
#include "launch/command.h"
#include "parallel/communicator.h"
#include "parallel/mpi_communicator.h"

namespace {

std::string FirstLine(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string WhatIsWrong(const CLI::App& app, const CLI::ParseError& error) {
  // CLI11 says that a subcommand is required also where a word stands in its place.
  const std::vector<std::string> left = app.remaining(/*recurse=*/true);
  const bool no_command = error.get_exit_code() == static_cast<int>(CLI::ExitCodes::RequiredError);
  if (no_command && app.get_subcommands().empty() && !left.empty())
    return "unknown command '" + left[0] + "'";
  return FirstLine(error.what());
}

// Under mpirun all ranks have the same command line: rank 0 says what is wrong with it, and has
// said so before any exit code makes the launcher end the job.
int UsageError(sala::launch::CommandLine& line, const std::string& text) {
  std::unique_ptr<sala::parallel::MpiSession> mpi;
  if (sala::parallel::LaunchedByMpi()) {
    auto started = sala::parallel::MpiSession::Start(&line.argc, &line.argv);
    if (started.ok()) mpi = std::move(started).value();
  }
  if (mpi == nullptr || mpi->rank() == 0) {
    std::fprintf(stderr, "sala: error: USAGE: %s; see `sala --help` or `sala COMMAND --help`\n",
                 text.c_str());
  }
  if (mpi != nullptr) {
    const auto world = mpi->World();
    if (world.ok()) (*world)->Barrier().IgnoreError();
  }
  return static_cast<int>(sala::ExitCode::kUsage);
}

void AddTerminalOptions(CLI::App& app) {
  app.add_flag_callback(
      "--quiet", [] { sala::SetQuiet(true); },
      "no progress display, and only warnings and errors on the terminal");
  app.add_option_function<std::string>(
         "--color",
         [](const std::string& when) {
           sala::SetColourMode(when == "always"  ? sala::ColourMode::kAlways
                               : when == "never" ? sala::ColourMode::kNever
                                                 : sala::ColourMode::kAuto);
         },
         "auto (on terminals, unless NO_COLOR is set), always or never")
      ->check(CLI::IsMember({"auto", "always", "never"}));
}

int Run(int argc, char** argv) {
  using sala::launch::CommandLine;
  CommandLine line;
  line.argc = argc;
  line.argv = argv;
  line.app.set_version_flag("--version", "sala " + sala::launch::Version() + " (" +
                                             sala::launch::Commit() + ", " +
                                             sala::launch::BuildType() + ")");
  line.app.require_subcommand(1);
  AddTerminalOptions(line.app);
  line.app.footer(
      "Environment: SALA_CPU=portable, avx2 or avx512 names the instruction set of the CPU "
      "kernels;\n"
      "SALA_CUDA_MODULE names another CUDA module than the one beside the program.\n"
      "Each subcommand has --help with an example. Exit codes and error codes: docs/errors.md\n");
  sala::launch::AddTrainCommand(line);
  sala::launch::AddVerifyCommand(line);
  sala::launch::AddDataCommands(line);
  sala::launch::AddTokenizerCommands(line);
  sala::launch::AddCheckpointCommands(line);
  sala::launch::AddImportCommand(line);
  sala::launch::AddExportCommand(line);
  sala::launch::AddGenerateCommand(line);
  sala::launch::AddEvalCommand(line);
  sala::launch::AddLogitsCommand(line);
  sala::launch::AddBenchCommands(line);
  sala::launch::AddPlanCommand(line);
  sala::launch::AddReportCommand(line);
  sala::launch::AddDoctorCommand(line);
  sala::launch::AddExplainFaultCommand(line);
  sala::launch::AddCompletionCommand(line);
  try {
    line.app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success))
      return line.app.exit(error);  // --help, --version
    return UsageError(line, WhatIsWrong(line.app, error));
  }
  if (const std::string problem = sala::kernels::InstructionSetProblem(); !problem.empty())
    return UsageError(line, sala::Printable(problem));
  const sala::Status status = line.action();
  if (status.ok()) return 0;
  if (line.print_error) sala::launch::PrintError(status);
  return static_cast<int>(sala::ExitCodeOf(status));
}

}  // namespace

int main(int argc, char** argv) {
  sala::ReturnFreedMemory();
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    const sala::Status status = sala::ErrorOf(error);
    sala::launch::PrintError(status);
    return static_cast<int>(sala::ExitCodeOf(status));
  }
}
