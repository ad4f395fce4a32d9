// sala doctor: what this machine offers, line by line, with a verdict and what to do.
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>

#include "core/file.h"
#include "core/json.h"
#include "core/terminal.h"
#include "launch/build_info.h"
#include "launch/command.h"
#include "launch/doctor_checks.h"
#include "nlohmann/json.hpp"
#include "parallel/mpi_communicator.h"

namespace sala::launch {
namespace {

struct DoctorOptions {
  std::string directory = ".";
  bool need_cuda = false;
  bool json = false;
  bool as_rank = false;
};

const char* WordFor(Health health) {
  switch (health) {
    case Health::kOk:
      return "ok";
    case Health::kInfo:
      return "-";
    case Health::kWarning:
      return "warn";
    case Health::kFails:
      break;
  }
  return "FAILS";
}

void Print(const DoctorRow& row) {
  const Tint tint = row.health == Health::kOk        ? Tint::kGood
                    : row.health == Health::kWarning ? Tint::kWarning
                    : row.health == Health::kFails   ? Tint::kBad
                                                     : Tint::kFaint;
  // Padded before it is coloured: escape sequences have a length but no width.
  const std::string verdict = Tinted(STDOUT_FILENO, tint, Format("%-5s", WordFor(row.health)));
  std::printf("%s  %-8s %s\n", verdict.c_str(), row.name.c_str(), row.found.c_str());
  if (!row.remedy.empty()) std::printf("%16s-> %s\n", "", row.remedy.c_str());
}

nlohmann::ordered_json ToJson(const DoctorRow& row) {
  return {{"name", row.name},
          {"verdict", row.health == Health::kInfo ? "info" : WordFor(row.health)},
          {"found", row.found},
          {"remedy", row.remedy}};
}

Status Doctor(const DoctorOptions& options) {
  if (!IsDirectory(options.directory)) {
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     options.directory + ": no such directory; --dir names an existing one");
  }
  std::vector<DoctorRow> rows;
  const auto add = [&](const DoctorRow& row) {
    rows.push_back(row);
    if (options.json) return;
    Print(row);
    std::fflush(stdout);
  };
  add({.name = "sala",
       .health = Health::kInfo,
       .found = Version() + " (" + Commit() + ", " + BuildType() + " build)"});
  add({.name = "host", .health = Health::kInfo, .found = parallel::HostName()});
  add(CheckCpu());
  add(CheckThreads());
  add(CheckMemory());
  add(CheckMpi());
  add(CheckHdf5(options.directory));
  add(CheckDisk(options.directory));
  add(CheckFiles());
  add(CheckClock(options.directory));
  for (const DoctorRow& row : CheckCuda(options.need_cuda)) add(row);

  std::string failed;
  ExitCode exit_code = ExitCode::kOk;  // of the first that fails
  nlohmann::ordered_json lines = nlohmann::ordered_json::array();
  for (const DoctorRow& row : rows) {
    lines.push_back(ToJson(row));
    if (row.health != Health::kFails) continue;
    if (failed.empty()) exit_code = row.exit_code;
    failed += (failed.empty() ? "" : ", ") + row.name;
  }
  if (options.json) std::printf("%s\n", DumpJson(lines, 2).c_str());
  if (failed.empty()) return OkStatus();
  return MakeError(exit_code, "DOCTOR",
                   failed + ": not in order; the line of each says what was found and what to do");
}

}  // namespace

void AddDoctorCommand(CommandLine& line) {
  auto options = std::make_shared<DoctorOptions>();
  CLI::App* command = AddCommand(line.app, "doctor",
                                 "whether this machine will do: CPU, memory, MPI, disk, clock, GPU",
                                 "sala doctor --dir runs");
  command->add_option("--dir", options->directory, "where runs will lie: its disk is measured")
      ->capture_default_str();
  command->add_flag("--need-cuda", options->need_cuda,
                    "fail (exit 71) where the GPU path does not work");
  command->add_flag("--json", options->json, "the same for a script");
  // The rank of the MPI check; group "" keeps it out of --help.
  command->add_flag("--as-rank", options->as_rank)->group("");
  line.OnUse(command, [options, &line] {
    return options->as_rank ? DoctorRank(&line.argc, &line.argv) : Doctor(*options);
  });
}

}  // namespace sala::launch
