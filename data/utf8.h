// What ingest does about text that is not UTF-8 (the check itself is core/utf8.h).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace sala::data {

// Byte offset of the first ill-formed sequence, or -1.
int64_t FindInvalidUtf8(std::string_view text);

// Every ill-formed byte becomes U+FFFD.
std::string ReplaceInvalidUtf8(std::string_view text);

}  // namespace sala::data
