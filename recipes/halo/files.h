// The files of a HALO stage in RUN/halo, and how its numbers read in logs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "nlohmann/json_fwd.hpp"
#include "recipes/session.h"

namespace sala::recipes {

std::string HaloFile(const Session& session, const std::string& name);
// Collective: rank 0 writes, all learn whether it could.
Status WriteHaloJson(Session& session, const std::string& name, const nlohmann::json& content);

std::string Text(const char* format, double value);
std::string Text(const std::vector<int64_t>& layers);  // "0, 3"; "none"

}  // namespace sala::recipes
