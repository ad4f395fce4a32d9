// Programs started from this one, and what the user's Ctrl-C does to them.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"

namespace sala::launch {

struct ChildProgram {
  std::vector<std::string> words;  // [0]: the file, with its path
  // Set where the environment of this process does not say otherwise.
  std::vector<std::pair<std::string, std::string>> defaults = {};
  std::string output;     // file for what it prints, on both streams
  std::string stop_when;  // SIGUSR2 once this path exists; "": never
};

// Waits for the program to end and returns its exit code; 128 + N where signal N ended it. When
// `interrupted` says so, ends it with all it has started (SIGTERM, after three seconds SIGKILL):
// STOPPED (75). CHILD-START (74) when it cannot be started.
StatusOr<int> RunChild(const ChildProgram& program, const std::function<bool()>& interrupted);

// The file of the first program of this name in PATH; "" when there is none.
std::string FindInPath(const std::string& name);

// The file of this very program.
StatusOr<std::string> OwnProgram();

}  // namespace sala::launch
