// sala explain-fault: why the watchdog ended a run.
#include <cstdio>
#include <memory>
#include <string>

#include "launch/command.h"
#include "parallel/watchdog.h"

namespace sala::launch {
namespace {

Status Explain(const std::string& run) {
  SALA_ASSIGN_OR_RETURN(const parallel::FaultReport report, parallel::ExplainRun(run + "/logs"));
  std::printf("%s\n", report.paragraph.c_str());
  if (!report.divergence.empty())
    std::printf("first collective not common to all its ranks: %s\n", report.divergence.c_str());
  return OkStatus();
}

}  // namespace

void AddExplainFaultCommand(CommandLine& line) {
  auto run = std::make_shared<std::string>();
  CLI::App* command = AddCommand(line.app, "explain-fault",
                                 "which rank is the cause where the watchdog ended a run",
                                 "sala explain-fault runs/tiny");
  command->add_option("run", *run, "run directory")->required();
  line.OnUse(command, [run] { return Explain(*run); });
}

}  // namespace sala::launch
