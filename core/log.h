// Logging to stderr and, once opened, to a file of the run directory. Rank 0 shows INFO and up on the terminal, other ranks
// WARN and up; warnings carry rank and host.
//
//   SALA_LOG(Info) << "stage stable starts at step " << step;
#pragma once

#include <sstream>
#include <string>

#include "core/status.h"

namespace sala {

enum class LogLevel { kDebug, kInfo, kWarn, kError };

void SetLogIdentity(int rank, const std::string& host);  // also SetProcessIdentity
Status OpenLogFile(const std::string& path);             // appended to
void ReopenLogFile();                                    // after SIGHUP
void Log(LogLevel level, const std::string& text);

class LogLine {
 public:
  explicit LogLine(LogLevel level) : level_(level) {}
  LogLine(const LogLine&) = delete;
  LogLine& operator=(const LogLine&) = delete;
  ~LogLine() { Log(level_, text_.str()); }
  std::ostream& stream() { return text_; }

 private:
  LogLevel level_;
  std::ostringstream text_;
};

}  // namespace sala

#define SALA_LOG(level) ::sala::LogLine(::sala::LogLevel::k##level).stream()
