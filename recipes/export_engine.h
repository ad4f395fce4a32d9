// What programs that load exported folders need, as far as it is known (docs/howto/export.md):
// checks before and after a folder is written, and the command lines for it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/status.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

enum class Engine : uint8_t { kHf, kSglang, kVllm };
std::optional<Engine> ParseEngine(const std::string& name);  // hf, sglang, vllm

// Of config.json as it will be written. `files`: names of those that will lie beside it, the
// model's own Python code among them. EXP-ENGINE (65) with the field that stands in the way.
Status CheckEngineConfig(Engine engine, const nlohmann::json& config,
                         const std::vector<std::string>& files);
// Of the folder that was written: servers need a tokenizer that they read. EXP-ENGINE (65).
Status CheckEngineFolder(Engine engine, const std::string& directory);

// The class of the configuration in auto_map. SGLang has one of its own for hybrids, and takes it
// where config.json names no other.
inline constexpr char kAutoConfig[] = "AutoConfig";

// The command that loads or serves the folder there.
std::string LoadCommand(Engine engine, const std::string& directory, const nlohmann::json& config);
// Commands of lm-evaluation-harness (which has RULER's tasks) on the folder, through transformers
// or through the server that LoadCommand starts, and of this program's own tasks. Through a server
// the client is told the tokenizer and the length of a prompt: it does not ask. USAGE (64): its
// lists of options cannot name such a path.
StatusOr<std::vector<std::string>> EvalCommands(std::optional<Engine> engine,
                                                const std::string& directory,
                                                const nlohmann::json& config);

}  // namespace sala::recipes
