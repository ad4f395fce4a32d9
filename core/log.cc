#include "core/log.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <ctime>
#include <mutex>
#include <string_view>
#include <system_error>

#include "core/check.h"
#include "core/terminal.h"

namespace sala {
namespace {

struct LogState {
  std::mutex mutex;
  int rank = 0;
  std::string host;
  std::string path;
  int file = -1;
  std::string status_line;
};

// Never destroyed: other threads may still log while the process ends.
LogState& State() {
  static auto* state = new LogState;
  return *state;
}

constexpr std::array<const char*, 4> kLevelNames = {"debug", "info", "warn", "error"};

void WriteFully(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nowhere left to tell
    text.remove_prefix(static_cast<size_t>(n));
  }
}

std::string TimeText(const char* format) {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm local{};
  localtime_r(&now, &local);
  std::array<char, 32> text{};
  const size_t n = std::strftime(text.data(), text.size(), format, &local);
  return {text.data(), n};
}

constexpr char kClearLine[] = "\r\x1b[K";

// One write per line, so that lines of ranks that share a terminal do not mix.
void WriteAboveStatusLine(const LogState& state, const std::string& line) {
  if (state.status_line.empty()) {
    WriteFully(STDERR_FILENO, line);
  } else {
    WriteFully(STDERR_FILENO, kClearLine + line + state.status_line);
  }
}

std::string TintedLevel(LogLevel level, const std::string& name) {
  if (level < LogLevel::kWarn) return name;
  return Tinted(STDERR_FILENO, level == LogLevel::kWarn ? Tint::kWarning : Tint::kBad, name);
}

Status OpenLocked(LogState& state) {
  const int fd = ::open(state.path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) {
    return MakeError(
        ExitCode::kIo, "FILE-WRITE",
        state.path + ": cannot open the log file: " + std::generic_category().message(errno));
  }
  if (state.file >= 0) ::close(state.file);
  state.file = fd;
  return OkStatus();
}

}  // namespace

void SetLogIdentity(int rank, const std::string& host) {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.rank = rank;
  state.host = host;
  SetProcessIdentity(rank, host.c_str());
}

Status OpenLogFile(const std::string& path) {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  state.path = path;
  return OpenLocked(state);
}

void ReopenLogFile() {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (state.path.empty()) return;
  const Status status = OpenLocked(state);
  if (!status.ok()) WriteAboveStatusLine(state, MessageOf(status) + "; the old file is kept\n");
}

void Log(LogLevel level, const std::string& text) {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  const std::string name = kLevelNames[static_cast<size_t>(level)];
  std::string line = " ";
  if (level >= LogLevel::kWarn) {
    line +=
        "[rank " + std::to_string(state.rank) + (state.host.empty() ? "" : "@" + state.host) + "] ";
  }
  line += text + "\n";
  const LogLevel terminal_level = state.rank == 0 && !Quiet() ? LogLevel::kInfo : LogLevel::kWarn;
  const LogLevel file_level = state.rank == 0 ? LogLevel::kDebug : LogLevel::kWarn;
  if (level >= terminal_level)
    WriteAboveStatusLine(state, TimeText("%H:%M:%S") + " " + TintedLevel(level, name) + line);
  if (state.file >= 0 && level >= file_level)
    WriteFully(state.file, TimeText("%Y-%m-%d %H:%M:%S") + " " + name + line);
}

void SetStatusLine(const std::string& line) {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (!state.status_line.empty() || !line.empty()) WriteFully(STDERR_FILENO, kClearLine + line);
  state.status_line = line;
}

void KeepStatusLine() {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (!state.status_line.empty()) WriteFully(STDERR_FILENO, "\n");
  state.status_line.clear();
}

void PrintPlainLine(const std::string& line) {
  LogState& state = State();
  const std::lock_guard<std::mutex> lock(state.mutex);
  WriteAboveStatusLine(state, line + "\n");
}

}  // namespace sala
