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
#include "nlohmann/json.hpp"

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

// The same of a header alone, in front of so many bytes of data; `begin` of the entries counts from
// the start of the data.
StatusOr<SafetensorsHeader> ParseSafetensorsHeaderText(std::string_view text, int64_t data_bytes);

// A JSON object in which no key is there twice, at any level, and nothing is nested deeper than the
// header and the index of a model need. `what` is for messages ("the header"). ST-JSON, ST-DUP.
StatusOr<nlohmann::json> ParseUniqueJson(std::string_view text, const std::string& what);

// Bytes of one element of a dtype as written ("BF16"), or 0 for an unknown one.
int64_t SafetensorsElementBytes(const std::string& dtype);

// Where tensors of this dtype stand in a file: larger first, so that every tensor is aligned to its
// own element size; among types of one size the order of the official library.
int SafetensorsTypeOrder(const std::string& dtype);

}  // namespace sala
