#include "core/terminal.h"

#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>

namespace sala {
namespace {

std::atomic<ColourMode> colour_mode{ColourMode::kAuto};
std::atomic<bool> quiet_mode{false};

constexpr std::array<const char*, 4> kTints = {"\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[2m"};
constexpr char kPlain[] = "\x1b[0m";

std::string_view Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string_view() : std::string_view(value);
}

}  // namespace

void SetColourMode(ColourMode mode) { colour_mode = mode; }

bool ColourOn(int fd) {
  switch (colour_mode.load()) {
    case ColourMode::kAlways:
      return true;
    case ColourMode::kNever:
      return false;
    case ColourMode::kAuto:
      break;
  }
  return ::isatty(fd) == 1 && Environment("NO_COLOR").empty() && Environment("TERM") != "dumb";
}

std::string Tinted(int fd, Tint tint, const std::string& text) {
  if (!ColourOn(fd)) return text;
  return kTints[static_cast<size_t>(tint)] + text + kPlain;
}

void SetQuiet(bool quiet) { quiet_mode = quiet; }

bool Quiet() { return quiet_mode; }

}  // namespace sala
