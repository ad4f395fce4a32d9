#include "launch/record_rules.h"

#include <cstdio>

#include "core/file.h"
#include "launch/command.h"

namespace sala::launch {

StatusOr<std::map<std::string, data::RecordRule>> ParseRules(
    const std::vector<std::string>& texts) {
  const std::map<std::string, data::RecordRule> actions = {{"error", data::RecordRule::kError},
                                                           {"skip", data::RecordRule::kSkip},
                                                           {"fix", data::RecordRule::kFix}};
  std::map<std::string, data::RecordRule> rules;
  for (const std::string& text : texts) {
    const size_t equals = text.find('=');
    const auto action = actions.find(equals == std::string::npos ? "" : text.substr(equals + 1));
    if (action == actions.end()) {
      return MakeError(
          ExitCode::kUsage, "USAGE",
          "--rule " + Printable(text) + ": expected RULE=error, RULE=skip or RULE=fix");
    }
    rules[text.substr(0, equals)] = action->second;
  }
  return rules;
}

void PrintCases(const std::map<std::string, int64_t>& cases) {
  const std::map<std::string, std::string> meanings = {
      {"lone_surrogate", "records with half of a surrogate pair"},
      {"invalid_utf8", "records that are not UTF-8"},
      {"not_json", "records that are not JSON"},
      {"not_object", "records that are no JSON object"},
      {"field_missing", "records without text or chat under the fields asked for"},
      {"wrong_type", "records with a field of another type"},
      {"nul", "texts with NUL characters"},
      {"chat", "chats that the template cannot write"},
      {"empty", "records without text"},
      {"duplicate", "copies of a record before"},
      {"empty_target", "chats with nothing to learn"}};
  for (const auto& [rule, count] : cases)
    std::printf("  %-16s %s  %s\n", rule.c_str(), WithCommas(count).c_str(),
                meanings.at(rule).c_str());
}

}  // namespace sala::launch
