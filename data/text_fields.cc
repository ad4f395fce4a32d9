#include "data/text_fields.h"

#include <simdjson.h>

#include <algorithm>
#include <optional>

#include "data/record_reader.h"

namespace sala::data {
namespace {

static_assert(kRecordPadding >= simdjson::SIMDJSON_PADDING);

using simdjson::dom::element;

std::vector<std::string> PathOf(const std::string& dotted) {
  std::vector<std::string> path;
  size_t begin = 0;
  while (true) {
    const size_t dot = dotted.find('.', begin);
    path.push_back(dotted.substr(begin, dot == std::string::npos ? dot : dot - begin));
    if (dot == std::string::npos) return path;
    begin = dot + 1;
  }
}

// Of a key that is there twice the last value counts, as with the slow parser.
std::optional<element> Find(const simdjson::dom::object& object, const std::string& key) {
  std::optional<element> found;
  for (const auto field : object) {
    if (field.key == key) found = field.value;
  }
  return found;
}

std::optional<element> FindPath(const simdjson::dom::object& record,
                                const std::vector<std::string>& path) {
  std::optional<element> at = Find(record, path[0]);
  for (size_t i = 1; i < path.size() && at.has_value(); ++i) {
    if (!at->is_object()) return std::nullopt;
    at = Find(at->get_object().value_unsafe(), path[i]);
  }
  return at;
}

// Numbers with a fraction are written in more than one way, so they are left to the slow parser.
bool IdText(const element& value, std::string* id) {
  switch (value.type()) {
    case simdjson::dom::element_type::STRING:
      *id = std::string_view(value.get_string().value_unsafe());
      return true;
    case simdjson::dom::element_type::INT64:
      *id = std::to_string(value.get_int64().value_unsafe());
      return true;
    case simdjson::dom::element_type::UINT64:
      *id = std::to_string(value.get_uint64().value_unsafe());
      return true;
    case simdjson::dom::element_type::BOOL:
      *id = value.get_bool().value_unsafe() ? "true" : "false";
      return true;
    case simdjson::dom::element_type::NULL_VALUE:
      *id = "null";
      return true;
    default:
      return false;
  }
}

}  // namespace

// The DOM parser: it checks the whole record, while simdjson's on-demand one looks no further than
// the field asked for and takes a record that is broken behind it for whole.
struct TextFieldParser::Parser {
  simdjson::dom::parser dom;
};

TextFieldParser::TextFieldParser(const IngestOptions& options)
    : text_path_(PathOf(options.text_field)),
      id_path_(PathOf(options.id_field)),
      chat_keys_{PathOf(options.messages_field)[0], "conversations", "instruction"},
      parser_(std::make_unique<Parser>()) {}

TextFieldParser::TextFieldParser(TextFieldParser&& other) noexcept = default;
TextFieldParser::~TextFieldParser() = default;

bool TextFieldParser::Parse(std::string_view record, std::string* text, std::string* id) {
  element root;
  if (parser_->dom.parse(record.data(), record.size(), /*realloc_if_needed=*/false).get(root) !=
      simdjson::SUCCESS)
    return false;
  if (!root.is_object()) return false;
  const simdjson::dom::object object = root.get_object().value_unsafe();
  for (const auto field : object) {
    if (std::find(chat_keys_.begin(), chat_keys_.end(), field.key) != chat_keys_.end())
      return false;
  }
  const std::optional<element> found = FindPath(object, text_path_);
  if (!found.has_value() || !found->is_string()) return false;
  const std::optional<element> name = FindPath(object, id_path_);
  id->clear();
  if (name.has_value() && !IdText(*name, id)) return false;
  *text = std::string_view(found->get_string().value_unsafe());
  return true;
}

bool IsUtf8Fast(std::string_view text) { return simdjson::validate_utf8(text.data(), text.size()); }

}  // namespace sala::data
