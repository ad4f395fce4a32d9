// How the program speaks to a person: colour only on terminals, and less of it with --quiet. What a
// command was asked for goes to stdout whatever is set here.
#pragma once

#include <cstdint>
#include <string>

namespace sala {

enum class ColourMode : uint8_t {
  kAuto,  // on terminals, unless NO_COLOR is set to something or TERM is "dumb"
  kAlways,
  kNever,
};

void SetColourMode(ColourMode mode);  // of the whole process; kAuto at the start
bool ColourOn(int fd);                // STDOUT_FILENO or STDERR_FILENO

enum class Tint : uint8_t { kGood, kWarning, kBad, kFaint };

// The text between the escape sequences of the tint; as it is where colour is off for this fd.
std::string Tinted(int fd, Tint tint, const std::string& text);

// No progress display, and on the terminal only warnings and errors of the log; log files are whole
// all the same.
void SetQuiet(bool quiet);
bool Quiet();

}  // namespace sala
