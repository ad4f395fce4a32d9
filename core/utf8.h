// UTF-8 checks.
#pragma once

#include <cstddef>
#include <string_view>

namespace sala {

// Bytes of the well-formed UTF-8 sequence that starts at text[at] (1 to 4), or 0 where there is
// none: over-long forms, surrogates, values above U+10FFFF and cut sequences are not well formed
// (Unicode, table 3-7).
size_t Utf8SequenceLength(std::string_view text, size_t at);

bool IsValidUtf8(std::string_view text);

}  // namespace sala
