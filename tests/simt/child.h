// Runs a shell command and gives its output (both streams) and exit code.
#pragma once

#include <sys/wait.h>

#include <cstdio>
#include <string>

namespace simt_test {

struct ChildResult {
  int exit_code = -1;
  std::string output;
};

inline ChildResult Child(const std::string& command) {
  ChildResult result;
  // One race is enough, and no time is spent at the exit.
  const std::string full =
      "export TSAN_OPTIONS=halt_on_error=1:atexit_sleep_ms=0; " + command + " 2>&1";
  FILE* pipe = popen(full.c_str(), "r");
  if (pipe == nullptr) return result;
  char buffer[4096];
  for (size_t n = 0; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) {
    result.output.append(buffer, n);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
  return result;
}

}  // namespace simt_test
