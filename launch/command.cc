#include "launch/command.h"

#include <unistd.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "core/terminal.h"

namespace sala::launch {

CLI::App* AddCommand(CLI::App& parent, const std::string& name, const std::string& description,
                     const std::string& example) {
  CLI::App* command = parent.add_subcommand(name, description);
  command->footer("Example:\n  " + example + "\n");
  command->fallthrough();  // --quiet and --color may stand behind any command
  return command;
}

void PrintError(const Status& status) {
  std::string text;
  // Names of files may hold what a terminal obeys. A message about several mistakes has lines.
  // In UTF-8 U+0080..U+009F, which some terminals obey, are C2 80..9F.
  const std::string message = MessageOf(status);
  for (size_t i = 0; i < message.size(); ++i) {
    const char c = message[i];
    const auto byte = static_cast<unsigned char>(c);
    const auto next = static_cast<unsigned char>(i + 1 < message.size() ? message[i + 1] : ' ');
    if (byte == 0xC2 && next >= 0x80 && next < 0xA0) {
      text += Format("\\xc2\\x%02x", next);
      ++i;
    } else {
      text +=
          (byte < 0x20 && c != '\n') || byte == 0x7F ? Format("\\x%02x", byte) : std::string(1, c);
    }
  }
  std::fflush(stdout);  // what was printed before stands before it
  std::fprintf(stderr, "sala: %s %s\n", Tinted(STDERR_FILENO, Tint::kBad, "error:").c_str(),
               text.c_str());
}

std::string WithCommas(int64_t value) {
  std::string text = std::to_string(value);
  const size_t first = value < 0 ? 1 : 0;
  for (auto i = static_cast<int64_t>(text.size()) - 3; i > static_cast<int64_t>(first); i -= 3) {
    text.insert(static_cast<size_t>(i), ",");
  }
  return text;
}

std::string ByteText(int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? std::to_string(bytes) + " B" : Format("%.1f %s", value, kUnits[unit]);
}

std::string Format(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  va_list again;
  va_copy(again, arguments);
  std::string text(static_cast<size_t>(std::vsnprintf(nullptr, 0, format, arguments)), '\0');
  va_end(arguments);
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

}  // namespace sala::launch
