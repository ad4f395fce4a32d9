// Numbers and columns of what is printed.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace sala::recipes {

inline std::string Format(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

inline std::string Padded(std::string text, int width) {  // right-aligned where width > 0
  const auto size = static_cast<size_t>(std::abs(width));
  if (text.size() < size) text.insert(width > 0 ? 0 : text.size(), size - text.size(), ' ');
  return text;
}

}  // namespace sala::recipes
