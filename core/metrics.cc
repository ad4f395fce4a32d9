#include "core/metrics.h"

#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "core/json.h"

namespace sala {
namespace {

Status MetricsError(const std::string& what) {
  return MakeError(ExitCode::kIo, "FILE-WRITE",
                   what + ": " + std::generic_category().message(errno));
}

}  // namespace

StatusOr<MetricsFile> MetricsFile::Open(const std::string& path) {
  MetricsFile metrics;
  metrics.file_ = std::fopen(path.c_str(), "ae+");
  if (metrics.file_ == nullptr) return MetricsError(path + ": cannot open the metrics file");
  // A process that was killed may have left half a line; start on a new one so that only that line
  // is lost.
  if (std::fseek(metrics.file_, -1, SEEK_END) == 0 && std::fgetc(metrics.file_) != '\n') {
    std::fseek(metrics.file_, 0, SEEK_END);
    std::fputc('\n', metrics.file_);
  }
  return metrics;
}

MetricsFile::MetricsFile(MetricsFile&& other) noexcept
    : file_(std::exchange(other.file_, nullptr)) {}

MetricsFile& MetricsFile::operator=(MetricsFile&& other) noexcept {
  std::swap(file_, other.file_);
  return *this;
}

MetricsFile::~MetricsFile() {
  if (file_ != nullptr) std::fclose(file_);
}

Status MetricsFile::Write(const nlohmann::ordered_json& line) {
  // Text that is not UTF-8 must not end a run: it is replaced, not thrown at.
  const std::string text = DumpJson(line) + "\n";
  if (std::fseek(file_, 0, SEEK_END) != 0 ||
      std::fwrite(text.data(), 1, text.size(), file_) != text.size() || std::fflush(file_) != 0) {
    return MetricsError("cannot write metrics");
  }
  return OkStatus();
}

std::string HexFloat(double value) {
  std::array<char, 64> text{};
  const int n = std::snprintf(text.data(), text.size(), "%a", value);
  return {text.data(), static_cast<size_t>(n)};
}

}  // namespace sala
