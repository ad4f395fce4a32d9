#include "core/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <utility>

#include "core/clock.h"
#include "core/log.h"
#include "core/terminal.h"
#include "core/utf8.h"

namespace sala {
namespace {

constexpr double kTerminalSeconds = 0.1;  // between redraws of the line
constexpr double kPlainSeconds = 10.0;    // between plain lines
constexpr int kBarWidth = 24;
constexpr int kDefaultWidth = 80;

int TerminalWidth() {
  struct winsize size {};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return kDefaultWidth;
  return size.ws_col - 1;  // writing the last column wraps on some terminals
}

// One column per code point: our texts hold no wide characters.
int Columns(const std::string& text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char c) {
    return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U;
  }));
}

std::string CutToColumns(const std::string& text, int columns) {
  size_t at = 0;
  for (int i = 0; i < columns && at < text.size(); ++i) {
    at += std::max<size_t>(1, Utf8SequenceLength(text, at));
  }
  return text.substr(0, at);
}

double Fraction(const ProgressState& state) {
  if (state.total <= 0) return 1.0;
  return std::clamp(static_cast<double>(state.done) / static_cast<double>(state.total), 0.0, 1.0);
}

template <typename... Numbers>
std::string Formatted(const char* format, Numbers... numbers) {
  std::array<char, 64> text{};
  const int n = std::snprintf(text.data(), text.size(), format, numbers...);
  return {text.data(), static_cast<size_t>(n)};
}

}  // namespace

std::string DurationText(double seconds) {
  if (!(seconds >= 0) || seconds > 1e9) return "-";
  const auto s = static_cast<long long>(std::llround(seconds));
  const long long h = s / 3600;
  const long long m = s / 60 % 60;
  if (h >= 24) return Formatted("%lldd %02lld:%02lld", h / 24, h % 24, m);
  if (h > 0) return Formatted("%lld:%02lld:%02lld", h, m, s % 60);
  return Formatted("%lld:%02lld", m, s % 60);
}

std::string ProgressLine(const ProgressState& state, int width) {
  const double fraction = Fraction(state);
  // Rounded down: 100% stands for "done" only.
  const int percent = static_cast<int>(fraction * 100);
  const std::string counts = Formatted("%3d%%  ", percent) + std::to_string(state.done) + "/" +
                             std::to_string(state.total) + "  left " +
                             DurationText(state.seconds_left);
  const auto filled = static_cast<size_t>(fraction * kBarWidth);
  const std::string bar =
      "[" + std::string(filled, '#') + std::string(kBarWidth - filled, '.') + "] ";
  const std::string text = state.text.empty() ? "" : "  " + state.text;
  std::string full = state.label + " " + bar + counts + text;
  if (Columns(full) <= width) return full;
  return CutToColumns(state.label + " " + counts + text, std::max(width, 0));
}

ProgressDisplay::ProgressDisplay(std::string label, int64_t total, bool enabled)
    : enabled_(enabled && !Quiet()),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_seconds_(ClockSeconds()) {
  state_.label = std::move(label);
  state_.total = total;
}

ProgressDisplay::~ProgressDisplay() { Finish(); }

void ProgressDisplay::Draw(double now) {
  if (terminal_) {
    SetStatusLine(ProgressLine(state_, TerminalWidth()));
  } else {
    // Whole lines for files: no bar, no limit.
    PrintPlainLine(
        state_.label + " " + std::to_string(state_.done) + "/" + std::to_string(state_.total) +
        " (" + std::to_string(static_cast<int>(Fraction(state_) * 100)) + "%)  left " +
        DurationText(state_.seconds_left) + (state_.text.empty() ? "" : "  " + state_.text));
  }
  last_draw_seconds_ = now;
  drawn_ = true;
}

void ProgressDisplay::Update(int64_t done, const std::string& text) {
  if (!enabled_ || finished_) return;
  const double now = ClockSeconds();
  if (first_ < 0) {
    first_ = done;
    start_seconds_ = now;
  }
  state_.done = done;
  state_.text = text;
  if (done > first_) {
    const double per_step = (now - start_seconds_) / static_cast<double>(done - first_);
    state_.seconds_left = per_step * static_cast<double>(std::max<int64_t>(0, state_.total - done));
  }
  drawn_ = false;
  const double interval = terminal_ ? kTerminalSeconds : kPlainSeconds;
  if (last_draw_seconds_ < 0 || now - last_draw_seconds_ >= interval) Draw(now);
}

void ProgressDisplay::Finish() {
  if (!enabled_ || finished_) return;
  finished_ = true;
  if (first_ >= 0 && !drawn_) Draw(ClockSeconds());
  if (terminal_) KeepStatusLine();
}

}  // namespace sala
