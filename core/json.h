// JSON texts of others, and values with their strings.
#pragma once

#include <string>
#include <string_view>

#include "nlohmann/json.hpp"

namespace sala {

// The parser has no limit on nesting, but writing a value out (for a message) calls itself for
// every level. The value; a discarded one where the text is no JSON or is nested more than 64 deep.
inline nlohmann::json ParseJson(std::string_view text) {
  constexpr int kMaxNesting = 64;
  bool deep = false;
  const auto keep = [&deep](int depth, nlohmann::json::parse_event_t, const nlohmann::json&) {
    deep = deep || depth > kMaxNesting;
    return !deep;
  };
  nlohmann::json json = nlohmann::json::parse(text, keep, /*allow_exceptions=*/false);
  if (deep) return nlohmann::json(nlohmann::json::value_t::discarded);
  return json;
}

// The text of a value whose strings may hold any bytes: what is no UTF-8 becomes U+FFFD. In one
// line, or a line an entry with `indent` spaces a level.
template <typename Json>
std::string DumpJson(const Json& value, int indent = -1) {
  return value.dump(indent, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

}  // namespace sala
