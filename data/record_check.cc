#include "data/record_check.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/config.h"
#include "core/file.h"
#include "data/utf8.h"

namespace sala::data {
namespace {

using json = nlohmann::ordered_json;  // templates of chats print objects in their order

std::map<std::string, RecordRule> DefaultRules() {
  return {{"not_json", RecordRule::kError},
          {"not_object", RecordRule::kError},
          {"field_missing", RecordRule::kError},
          {"wrong_type", RecordRule::kError},
          {"invalid_utf8", RecordRule::kError},
          {"lone_surrogate", RecordRule::kSkip},
          {"nul", RecordRule::kFix},
          {"chat", RecordRule::kError},
          {"empty", RecordRule::kSkip},
          {"duplicate", RecordRule::kSkip},
          {"empty_target", RecordRule::kSkip}};
}

bool CanFix(const std::string& rule) {
  return rule == "invalid_utf8" || rule == "lone_surrogate" || rule == "nul";
}

const json* FindField(const json& record, const std::string& dotted) {
  const json* at = &record;
  size_t begin = 0;
  while (at != nullptr) {
    const size_t dot = dotted.find('.', begin);
    const std::string key = dotted.substr(begin, dot == std::string::npos ? dot : dot - begin);
    if (!at->is_object() || !at->contains(key)) return nullptr;
    at = &(*at)[key];
    if (dot == std::string::npos) return at;
    begin = dot + 1;
  }
  return nullptr;
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The value of "\uXXXX" at text[at], or -1.
int EscapeAt(std::string_view text, size_t at) {
  if (at + 6 > text.size() || text[at] != '\\' || text[at + 1] != 'u') return -1;
  int value = 0;
  for (size_t i = at + 2; i < at + 6; ++i) {
    const int digit = HexDigit(text[i]);
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

// Byte offsets of the \uXXXX escapes that are half of a surrogate pair without the other half.
std::vector<size_t> LoneSurrogates(std::string_view text) {
  std::vector<size_t> lone;
  for (size_t at = text.find('\\'); at < text.size(); at = text.find('\\', at + 1)) {
    const int value = EscapeAt(text, at);
    if (value < 0xd800 || value > 0xdfff) {
      ++at;  // the escaped character, so that "\\" does not start another escape
      continue;
    }
    const int second = EscapeAt(text, at + 6);
    if (value < 0xdc00 && second >= 0xdc00 && second <= 0xdfff) {
      at += 11;
    } else {
      lone.push_back(at);
      at += 5;
    }
  }
  return lone;
}

// Copying and writing out a value call themselves for every level, as does the parser of Python
// that templates get their conversation from (at most 1000 levels).
constexpr int64_t kMostLevels = 500;

// How deep arrays and objects lie in each other, at most.
int64_t Levels(std::string_view text) {
  int64_t levels = 0, most = 0;
  bool quoted = false;
  for (size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '"') quoted = !quoted;
    if (quoted && c == '\\') ++at;
    if (quoted) continue;
    if (c == '[' || c == '{') most = std::max(most, ++levels);
    if (c == ']' || c == '}') --levels;
  }
  return most;
}

}  // namespace

std::string Place(const std::string& path, int64_t line, int64_t offset) {
  return path + ":" + std::to_string(line) + " (byte " + std::to_string(offset) + ")";
}

StatusOr<RecordChecker> RecordChecker::Make(const IngestOptions& options) {
  RecordChecker checker(options);
  checker.rules_ = DefaultRules();
  for (const auto& [name, rule] : options.rules) {
    const auto known = checker.rules_.find(name);
    if (known == checker.rules_.end()) {
      std::vector<std::string> names;
      for (const auto& [n, r] : checker.rules_) names.push_back(n);
      const std::string nearest = NearestWord(name, names);
      return MakeError(ExitCode::kConfig, "ING-RULE",
                       "no rule is named \"" + Printable(name) + "\"" +
                           (nearest.empty() ? "" : "; did you mean " + nearest + "?"));
    }
    if (rule == RecordRule::kFix && !CanFix(name)) {
      return MakeError(
          ExitCode::kConfig, "ING-RULE",
          "rule " + name + ": found fix, expected error or skip; such a record cannot be repaired");
    }
    known->second = rule;
  }
  return checker;
}

Status RecordChecker::Apply(const Failure& failure, const std::string& where,
                            Outcome* outcome) const {
  if (rules_.at(failure.rule) == RecordRule::kError) {
    return MakeError(ExitCode::kData, failure.code,
                     where + ": " + failure.text + "; correct the record or set the rule " +
                         failure.rule + " to skip");
  }
  outcome->cases.push_back({failure.rule, "skip"});
  outcome->keep = false;
  return OkStatus();
}

Status RecordChecker::CheckBytes(std::string* text, int64_t line, const std::string& where,
                                 Outcome* outcome) const {
  if (IsUtf8Fast(*text)) return OkStatus();
  const int64_t bad = FindInvalidUtf8(*text);
  if (rules_.at("invalid_utf8") == RecordRule::kFix) {
    *text = ReplaceInvalidUtf8(*text);
    outcome->cases.push_back({"invalid_utf8", "fix"});
    return OkStatus();
  }
  const auto end = text->begin() + bad;
  const int64_t bad_line = line + std::count(text->begin(), end, '\n');
  char hex[8];
  std::snprintf(hex, sizeof hex, "%02x",
                static_cast<unsigned>(static_cast<uint8_t>((*text)[static_cast<size_t>(bad)])));
  return Apply({"invalid_utf8", "ING-UTF8",
                "invalid UTF-8 on line " + std::to_string(bad_line) + ", byte " +
                    std::to_string(bad) + " of the record (0x" + hex + ")"},
               where, outcome);
}

Status RecordChecker::CheckNul(std::string* text, const std::string& where,
                               Outcome* outcome) const {
  const size_t at = text->find('\0');
  if (at == std::string::npos) return OkStatus();
  if (rules_.at("nul") == RecordRule::kFix) {
    std::erase(*text, '\0');
    outcome->cases.push_back({"nul", "fix"});
    return OkStatus();
  }
  return Apply({"nul", "ING-NUL", "NUL character at byte " + std::to_string(at) + " of the text"},
               where, outcome);
}

Status RecordChecker::CheckJson(const RawRecord& raw, const std::string& where, Outcome* outcome) {
  const std::vector<size_t> lone = LoneSurrogates(raw.bytes);
  if (lone.empty() && IsUtf8Fast(raw.bytes) && Levels(raw.bytes) <= kMostLevels &&
      fields_.Parse(raw.bytes, &outcome->record.text, &outcome->record.id))
    return OkStatus();
  std::string bytes(raw.bytes);
  if (!lone.empty()) {
    if (rules_.at("lone_surrogate") == RecordRule::kFix) {
      for (const size_t at : lone) bytes.replace(at, 6, "\\ufffd");
      outcome->cases.push_back({"lone_surrogate", "fix"});
    } else {
      return Apply(
          {"lone_surrogate", "ING-UTF8",
           "half of a surrogate pair at byte " + std::to_string(lone[0]) + " of the record"},
          where, outcome);
    }
  }
  // The parser refuses what is not UTF-8 too, so that has to be known first: it has a rule of its
  // own.
  SALA_RETURN_IF_ERROR(CheckBytes(&bytes, raw.line, where, outcome));
  if (!outcome->keep) return OkStatus();
  if (Levels(bytes) > kMostLevels)
    return Apply(
        {"not_json", "ING-JSON",
         "arrays and objects are nested deeper than " + std::to_string(kMostLevels) + " levels"},
        where, outcome);
  json record;
  try {
    record = json::parse(bytes);
  } catch (const json::parse_error& error) {
    return Apply({"not_json", "ING-JSON", "not JSON: " + Printable(error.what())}, where, outcome);
  }
  if (!record.is_object())
    return Apply({"not_object", "ING-JSON",
                  std::string("found a JSON ") + record.type_name() + ", expected an object"},
                 where, outcome);
  const json* text = FindField(record, options_.text_field);
  const ChatShape shape = ShapeOf(record, options_.messages_field);
  if (text == nullptr && shape == ChatShape::kNone) {
    std::string keys;
    for (const auto& [key, value] : record.items()) keys += (keys.empty() ? "" : ", ") + key;
    return Apply(
        {"field_missing", "ING-FIELD",
         "no field \"" + options_.text_field + "\" (text) or \"" + options_.messages_field +
             "\" (chat), no \"conversations\", no \"instruction\" with \"output\"; the "
             "record has: " +
             Printable(keys)},
        where, outcome);
  }
  // Only plain values name a record.
  if (const json* id = FindField(record, options_.id_field); id != nullptr && id->is_primitive())
    outcome->record.id = id->is_string() ? id->get<std::string>() : id->dump();
  outcome->record.shape = shape;
  if (shape != ChatShape::kNone) {
    auto parsed = ParseChat(record, shape, options_.messages_field);
    if (!parsed.ok()) {
      const std::string code = ErrorCodeOf(parsed.status());
      return Apply({"wrong_type", code, MessageOf(parsed.status()).substr(code.size() + 2)}, where,
                   outcome);
    }
    outcome->record.chat = std::move(*parsed);
    return OkStatus();
  }
  if (!text->is_string()) {
    return Apply({"wrong_type", "ING-FIELD",
                  "field \"" + options_.text_field + "\" is of type " + text->type_name() +
                      ", expected a string"},
                 where, outcome);
  }
  outcome->record.text = text->get<std::string>();
  return OkStatus();
}

StatusOr<RecordChecker::Outcome> RecordChecker::Check(const RawRecord& raw, InputFormat format,
                                                      const std::string& path) {
  const std::string where = Place(path, raw.line, raw.offset);
  Outcome outcome;
  CheckedRecord& record = outcome.record;
  if (format == InputFormat::kText) {
    record.text = raw.bytes;
    SALA_RETURN_IF_ERROR(CheckBytes(&record.text, raw.line, where, &outcome));
  } else {
    SALA_RETURN_IF_ERROR(CheckJson(raw, where, &outcome));
  }
  if (outcome.keep) SALA_RETURN_IF_ERROR(CheckNul(&record.text, where, &outcome));
  for (ChatMessage& message : record.chat.messages) {
    if (outcome.keep) SALA_RETURN_IF_ERROR(CheckNul(&message.content, where, &outcome));
  }
  const bool empty = record.is_chat() ? record.chat.messages.empty() : record.text.empty();
  if (outcome.keep && empty)
    SALA_RETURN_IF_ERROR(Apply({"empty", "ING-EMPTY", "the record has no text"}, where, &outcome));
  return outcome;
}

}  // namespace sala::data
