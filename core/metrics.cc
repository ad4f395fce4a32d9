#include "core/metrics.h"

#include <array>
#include <cstdio>

#include "core/json.h"

namespace sala {

StatusOr<MetricsFile> MetricsFile::Open(const std::string& path) {
  MetricsFile metrics;
  SALA_ASSIGN_OR_RETURN(metrics.file_, AppendFile::Open(path, AppendFile::At::kEnd));
  const char last = metrics.file_.last();
  metrics.half_line_ = last != 0 && last != '\n';
  return metrics;
}

Status MetricsFile::Write(const nlohmann::ordered_json& line) {
  // Text that is not UTF-8 must not end a run: it is replaced, not thrown at.
  const std::string text = DumpJson(line) + "\n";
  // On a new line behind a half one, so that only that one is lost.
  SALA_RETURN_IF_ERROR(file_.Append((half_line_ ? "\n" : "") + text));
  half_line_ = false;
  return OkStatus();
}

std::string HexFloat(double value) {
  std::array<char, 64> text{};
  const int n = std::snprintf(text.data(), text.size(), "%a", value);
  return {text.data(), static_cast<size_t>(n)};
}

}  // namespace sala
