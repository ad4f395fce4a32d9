// Logging to stderr and, once opened, to a file of the run directory. Rank 0 shows INFO and up on
// the terminal (WARN and up with SetQuiet), other ranks WARN and up; warnings carry rank and host.
// Lines read "HH:MM:SS level text"; in the file the date comes first. The file also gets rank 0's
// DEBUG lines.
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

// A line that stays at the bottom of the terminal: log lines are printed above it. "" takes it
// away. Used by the progress display, only where stderr is a terminal.
void SetStatusLine(const std::string& line);
// Leaves the current status line on the screen and goes to the next line.
void KeepStatusLine();
// A line on stderr as it is, above the status line.
void PrintPlainLine(const std::string& line);

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
