// The JSON header of a safetensors file; used by core/safetensors.cc and by tests that feed it
// arbitrary bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/safetensors.h"
#include "core/status.h"

namespace sala {

struct SafetensorsHeader {
  std::vector<SafetensorsEntry>
      entries;  // `begin` counts from the start of the file; sorted by begin, then by name
  std::map<std::string, std::string> metadata;
};

// Checks everything about `bytes`, the whole file, that the format demands, in the order of
// docs/formats.md, before any value is used. Errors without a path: ST-HEADER, ST-JSON, ST-DUP,
// ST-DTYPE, ST-SHAPE, ST-OFFSET, ST-GAP, ST-SIZE.
StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view bytes);

// Bytes of one element of a dtype as written ("BF16"), or 0 for an unknown one.
int64_t SafetensorsElementBytes(const std::string& dtype);

}  // namespace sala
