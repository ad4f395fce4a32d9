#include "recipes/halo/files.h"

#include <cstdio>

#include "core/file.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

std::string HaloFile(const Session& session, const std::string& name) {
  return session.path("halo/" + name);
}

Status WriteHaloJson(Session& session, const std::string& name, const nlohmann::json& content) {
  const Status written = session.is_root()
                             ? WriteFileAtomically(HaloFile(session, name), content.dump(1) + "\n")
                             : OkStatus();
  return parallel::AgreeOnStatus(session.world(), written);
}

std::string Text(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

std::string Text(const std::vector<int64_t>& layers) {
  std::string text;
  for (int64_t layer : layers) text += (text.empty() ? "" : ", ") + std::to_string(layer);
  return text.empty() ? "none" : text;
}

}  // namespace sala::recipes
