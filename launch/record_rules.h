// The option --rule of the commands that read records.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/ingest.h"

namespace sala::launch {

inline constexpr char kRuleHelp[] =
    "RULE=error|skip|fix for a kind of bad record (docs/formats.md)";

// Of texts RULE=ACTION. USAGE (64).
StatusOr<std::map<std::string, data::RecordRule>> ParseRules(const std::vector<std::string>& texts);

// How often each rule had a case, a line each: its name, the number and what it is about.
void PrintCases(const std::map<std::string, int64_t>& cases);

}  // namespace sala::launch
