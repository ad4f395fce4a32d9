// Metrics as JSON lines, one object a line, appended and seen by readers at once. A line that does
// not fit on the disk is left out whole.
#pragma once

#include <string>

#include "core/append_file.h"
#include "core/status.h"
#include "nlohmann/json_fwd.hpp"

namespace sala {

class MetricsFile {
 public:
  static StatusOr<MetricsFile> Open(const std::string& path);  // appends
  MetricsFile() = default;
  bool is_open() const { return file_.is_open(); }
  Status Write(const nlohmann::ordered_json& line);

 private:
  AppendFile file_;
  bool half_line_ = false;  // a process that was killed left one, and the file does not end it yet
};

// "%a": exact hexadecimal text of a number, for bit comparisons of runs.
std::string HexFloat(double value);

}  // namespace sala
