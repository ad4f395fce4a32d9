// sala report: a run as one HTML page.
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>

#include "core/file.h"
#include "core/log.h"
#include "launch/command.h"
#include "recipes/report_page.h"

namespace sala::launch {
namespace {

struct ReportOptions {
  std::string run;
  std::string to;
  int watch_seconds = 0;
};

Status Report(const ReportOptions& options) {
  const std::string to = options.to.empty() ? options.run + "/report.html" : options.to;
  while (true) {
    SALA_ASSIGN_OR_RETURN(const recipes::ReportData data, recipes::ReadReportData(options.run));
    SALA_RETURN_IF_ERROR(WriteFileAtomically(to, recipes::ReportPage(data, options.watch_seconds)));
    if (options.watch_seconds > 0 && !data.gone.empty())
      SALA_LOG(Warn) << options.run << ": the run was killed: " << data.gone;
    if (options.watch_seconds == 0 || !data.live()) break;
    ::sleep(static_cast<unsigned>(options.watch_seconds));
  }
  std::printf("%s\n", to.c_str());
  return OkStatus();
}

}  // namespace

void AddReportCommand(CommandLine& line) {
  auto options = std::make_shared<ReportOptions>();
  CLI::App* command =
      AddCommand(line.app, "report", "a run, finished or not, as one HTML page without network",
                 "sala report runs/tiny --to tiny.html");
  command->add_option("run", options->run, "run directory")->required();
  command->add_option("--to", options->to, "the page; default: report.html in the run directory");
  command
      ->add_option("--watch", options->watch_seconds,
                   "write it again every so many seconds until the run ends or is killed; the page "
                   "loads itself "
                   "again")
      ->check(CLI::Range(1, 86400));
  line.OnUse(command, [options] { return Report(*options); });
}

}  // namespace sala::launch
