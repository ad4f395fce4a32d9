// sala tokenizer verify and stats: whether a tokenizer gives the ids it should, and how it does on
// texts.
#pragma once

#include "launch/command.h"

namespace sala::launch {

inline constexpr char kTokenizerHelp[] =
    "directory, tokenizer.json, tokenizer.model or the word bytes";

void AddTokenizerChecks(CLI::App& group, CommandLine& line);

}  // namespace sala::launch
