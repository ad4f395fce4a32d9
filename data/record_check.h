// The checks of one record before it becomes tokens (the list is in data/ingest.h), each with its
// rule.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/chat_record.h"
#include "data/ingest.h"
#include "data/record_reader.h"
#include "data/text_fields.h"

namespace sala::data {

struct CheckedRecord {
  ChatShape shape = ChatShape::kNone;
  std::string text;  // of a text record
  ChatRecord chat;   // of a chat record
  std::string id;    // "" if the record has none
  bool is_chat() const { return shape != ChatShape::kNone; }
};

// One case of a rule: what was found and what is done about it.
struct RecordCase {
  std::string rule, action;  // action: "skip" or "fix"
};

class RecordChecker {
 public:
  // ING-RULE (78) when options.rules names an unknown rule or asks for a fix that does not exist.
  static StatusOr<RecordChecker> Make(const IngestOptions& options);

  struct Outcome {
    bool keep = true;
    CheckedRecord record;
    std::vector<RecordCase> cases;
  };
  // An error when a rule says so; its message starts with FILE:LINE (byte OFFSET). One object
  // belongs to one thread.
  StatusOr<Outcome> Check(const RawRecord& raw, InputFormat format, const std::string& path);

  RecordRule RuleOf(const std::string& name) const { return rules_.at(name); }

 private:
  explicit RecordChecker(const IngestOptions& options) : options_(options), fields_(options) {}
  struct Failure {
    std::string rule, code, text;
  };
  // The error, or the case noted in *outcome and keep = false.
  Status Apply(const Failure& failure, const std::string& where, Outcome* outcome) const;
  Status CheckBytes(std::string* text, int64_t line, const std::string& where,
                    Outcome* outcome) const;
  Status CheckNul(std::string* text, const std::string& where, Outcome* outcome) const;
  Status CheckJson(const RawRecord& raw, const std::string& where, Outcome* outcome);

  const IngestOptions& options_;
  std::map<std::string, RecordRule> rules_;
  TextFieldParser fields_;
};

// "books/a.jsonl:12 (byte 3456)".
std::string Place(const std::string& path, int64_t line, int64_t offset);

}  // namespace sala::data
