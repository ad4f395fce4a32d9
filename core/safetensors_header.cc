#include "core/safetensors_header.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "core/file.h"
#include "core/utf8.h"
#include "nlohmann/json.hpp"

namespace sala {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxNesting = 4;
constexpr size_t kMaxRankOnDisk = 8;

// In the order of tensors in a file.
constexpr std::array<std::pair<const char*, int64_t>, 15> kDTypes = {{{"U64", 8},
                                                                      {"I64", 8},
                                                                      {"F64", 8},
                                                                      {"F32", 4},
                                                                      {"U32", 4},
                                                                      {"I32", 4},
                                                                      {"BF16", 2},
                                                                      {"F16", 2},
                                                                      {"U16", 2},
                                                                      {"I16", 2},
                                                                      {"F8_E4M3", 1},
                                                                      {"F8_E5M2", 1},
                                                                      {"I8", 1},
                                                                      {"U8", 1},
                                                                      {"BOOL", 1}}};

// About a file whose bytes are not what its writer meant or what the format allows.
Status DataError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kData, code, text + "; fetch the file again, or write it anew");
}

// nlohmann keeps the last of duplicate keys silently and recurses without limit; this looks at the
// events first.
class UniqueKeys : public nlohmann::json_sax<json> {
 public:
  explicit UniqueKeys(std::string what) : what_(std::move(what)) {}
  Status status;

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return Enter(); }
  bool end_object() override { return Leave(); }
  bool start_array(size_t) override { return Enter(); }
  bool end_array() override { return Leave(); }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    status = DataError("ST-DUP", what_ + " holds the key `" + Printable(name) + "` twice");
    return false;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    status = DataError("ST-JSON", what_ + " is not JSON at byte " + std::to_string(position) +
                                      ": " + Printable(e.what()));
    return false;
  }

 private:
  bool Enter() {
    keys_.emplace_back();
    if (keys_.size() <= kMaxNesting) return true;
    status = DataError("ST-JSON",
                       what_ + " is nested more than " + std::to_string(kMaxNesting) + " deep");
    return false;
  }
  bool Leave() {
    keys_.pop_back();
    return true;
  }

  std::string what_;
  std::vector<std::set<std::string>> keys_;
};

// A non-negative integer that fits int64_t.
std::optional<int64_t> Count(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto n = value.get<uint64_t>();
  if (n > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return static_cast<int64_t>(n);
}

StatusOr<std::string_view> HeaderText(std::string_view bytes) {
  if (bytes.size() < kLengthBytes) {
    return DataError("ST-HEADER", "the file has " + std::to_string(bytes.size()) +
                                      " bytes, a safetensors file at least 8");
  }
  uint64_t n = 0;
  std::memcpy(&n, bytes.data(), kLengthBytes);  // little-endian, as the machines we build for
  if (n > kMaxHeaderBytes) {
    return DataError("ST-HEADER", "header length " + std::to_string(n) + " is above " +
                                      std::to_string(kMaxHeaderBytes) +
                                      " bytes, so this is no safetensors file");
  }
  if (n > bytes.size() - kLengthBytes) {
    return DataError("ST-HEADER", "header length " + std::to_string(n) +
                                      " goes past the end of a file of " +
                                      std::to_string(bytes.size()) +
                                      " bytes: the file is cut or no safetensors file");
  }
  const std::string_view header = bytes.substr(kLengthBytes, n);
  if (header.empty() || header[0] != '{')
    return DataError("ST-HEADER", "the header does not start with `{`");
  if (!IsValidUtf8(header)) return DataError("ST-HEADER", "the header is not valid UTF-8");
  return header;
}

StatusOr<SafetensorsEntry> ReadEntry(const std::string& name, const json& value,
                                     int64_t data_bytes) {
  const std::string where = "tensor `" + Printable(name) + "`: ";
  if (!value.is_object() || value.size() != 3 || !value.contains("dtype") ||
      !value.contains("shape") || !value.contains("data_offsets")) {
    return DataError("ST-JSON", where + "expected exactly dtype, shape and data_offsets, found " +
                                    Printable(value.dump()));
  }
  SafetensorsEntry entry;
  entry.name = name;
  if (!value["dtype"].is_string() ||
      SafetensorsElementBytes(value["dtype"].get<std::string>()) == 0) {
    return MakeError(ExitCode::kData, "ST-DTYPE",
                     where + "unknown dtype " + Printable(value["dtype"].dump()) +
                         "; convert the weights to BF16 or F32");
  }
  entry.dtype = value["dtype"].get<std::string>();
  const json& shape = value["shape"];
  if (!shape.is_array() || shape.size() > kMaxRankOnDisk) {
    return DataError("ST-SHAPE", where + "shape " + Printable(shape.dump()) +
                                     " is not a list of at most 8 sizes");
  }
  int64_t product = SafetensorsElementBytes(entry.dtype);
  bool overflow = false;
  for (const json& d : shape) {
    const auto size = Count(d);
    if (!size.has_value())
      return DataError("ST-SHAPE", where + "size " + Printable(d.dump()) + " in the shape");
    entry.shape.push_back(*size);
    // An overflow stays an error even when a later size is 0.
    overflow = __builtin_mul_overflow(product, *size, &product) || overflow;
  }
  if (overflow)
    return DataError("ST-SHAPE", where + "shape " + Printable(shape.dump()) + " is too large");
  const json& offsets = value["data_offsets"];
  const bool pair = offsets.is_array() && offsets.size() == 2;
  const auto begin = pair ? Count(offsets[0]) : std::nullopt;
  const auto end = pair ? Count(offsets[1]) : std::nullopt;
  if (!begin.has_value() || !end.has_value() || *begin > *end || *end > data_bytes) {
    return DataError("ST-OFFSET", where + "data_offsets " + Printable(offsets.dump()) +
                                      " do not lie in data of " + std::to_string(data_bytes) +
                                      " bytes");
  }
  entry.begin = *begin;
  entry.bytes = *end - *begin;
  return entry;
}

// The ranges must follow one another from 0 to the end of the data; then each must have the length
// its shape asks for.
Status CheckLayout(const std::vector<SafetensorsEntry>& entries, int64_t data_bytes) {
  int64_t at = 0;
  for (const SafetensorsEntry& entry : entries) {
    if (entry.begin != at) {
      return DataError("ST-GAP", "tensor `" + Printable(entry.name) + "` starts at " +
                                     std::to_string(entry.begin) + ", the data before it ends at " +
                                     std::to_string(at));
    }
    at += entry.bytes;
  }
  if (at != data_bytes) {
    return DataError("ST-GAP", "the tensors end at " + std::to_string(at) + ", the data has " +
                                   std::to_string(data_bytes) + " bytes");
  }
  for (const SafetensorsEntry& entry : entries) {
    int64_t expected = SafetensorsElementBytes(entry.dtype);
    for (const int64_t d : entry.shape) expected *= d;  // overflow was refused above
    if (entry.bytes != expected) {
      return DataError("ST-SIZE",
                       "tensor `" + Printable(entry.name) + "` has " + std::to_string(entry.bytes) +
                           " bytes, its shape and dtype need " + std::to_string(expected));
    }
  }
  return OkStatus();
}

StatusOr<std::map<std::string, std::string>> ReadMetadata(const json& value) {
  std::map<std::string, std::string> metadata;
  if (!value.is_object()) return DataError("ST-JSON", "__metadata__ is not an object");
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string())
      return DataError("ST-JSON", "__metadata__ `" + Printable(key) + "` is not a string");
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

}  // namespace

int64_t SafetensorsElementBytes(const std::string& dtype) {
  for (const auto& [name, bytes] : kDTypes) {
    if (dtype == name) return bytes;
  }
  return 0;
}

int SafetensorsTypeOrder(const std::string& dtype) {
  const auto* at = std::find_if(kDTypes.begin(), kDTypes.end(),
                                [&](const auto& type) { return dtype == type.first; });
  return static_cast<int>(at - kDTypes.begin());
}

StatusOr<json> ParseUniqueJson(std::string_view text, const std::string& what) {
  UniqueKeys scan(what);
  if (!json::sax_parse(text, &scan)) return scan.status;
  json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return DataError("ST-JSON", what + " is not a JSON object");
  return root;
}

StatusOr<SafetensorsHeader> ParseSafetensorsHeaderText(std::string_view text, int64_t data_bytes) {
  SALA_ASSIGN_OR_RETURN(const json root, ParseUniqueJson(text, "the header"));
  SafetensorsHeader header;
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") continue;
    SALA_ASSIGN_OR_RETURN(SafetensorsEntry entry, ReadEntry(name, value, data_bytes));
    header.entries.push_back(std::move(entry));
  }
  // Empty tensors share their begin with the next one and come before it.
  std::sort(header.entries.begin(), header.entries.end(),
            [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
              return std::tie(a.begin, a.bytes, a.name) < std::tie(b.begin, b.bytes, b.name);
            });
  SALA_RETURN_IF_ERROR(CheckLayout(header.entries, data_bytes));
  if (root.contains("__metadata__")) {
    SALA_ASSIGN_OR_RETURN(header.metadata, ReadMetadata(root["__metadata__"]));
  }
  return header;
}

StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view bytes) {
  SALA_ASSIGN_OR_RETURN(const std::string_view text, HeaderText(bytes));
  const auto data_begin = static_cast<int64_t>(kLengthBytes + text.size());
  SALA_ASSIGN_OR_RETURN(
      SafetensorsHeader header,
      ParseSafetensorsHeaderText(text, static_cast<int64_t>(bytes.size()) - data_begin));
  for (SafetensorsEntry& entry : header.entries) entry.begin += data_begin;
  return header;
}

}  // namespace sala
