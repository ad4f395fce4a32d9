// Metrics as JSON lines, one object a line, appended and flushed per line.
#pragma once

#include <cstdio>
#include <string>

#include "core/status.h"
#include "nlohmann/json_fwd.hpp"

namespace sala {

class MetricsFile {
 public:
  static StatusOr<MetricsFile> Open(const std::string& path);  // appends
  MetricsFile() = default;
  MetricsFile(MetricsFile&& other) noexcept;
  MetricsFile& operator=(MetricsFile&& other) noexcept;
  ~MetricsFile();
  bool is_open() const { return file_ != nullptr; }
  Status Write(const nlohmann::ordered_json& line);

 private:
  std::FILE* file_ = nullptr;
};

// "%a": exact hexadecimal text of a number, for bit comparisons of runs.
std::string HexFloat(double value);

}  // namespace sala
