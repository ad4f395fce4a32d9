// UTF-8 checks (Unicode 15, table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sala::data {

// Bytes of the well-formed character at the start of `text`; 0 if there is none.
int Utf8CharacterLength(std::string_view text);

// Byte offset of the first ill-formed sequence, or -1.
int64_t FindInvalidUtf8(std::string_view text);

// Every ill-formed byte becomes U+FFFD.
std::string ReplaceInvalidUtf8(std::string_view text);

}  // namespace sala::data
