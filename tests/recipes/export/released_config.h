// Facts of the released 9B model, from tests/recipes/export/minicpm_sala_9b.json: written down from
// its public files, not computed.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/file.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {

inline nlohmann::json ReleasedFacts() {
  const auto text = ReadFile(SALA_TEST_DATA "/export/minicpm_sala_9b.json");
  EXPECT_TRUE(text.ok());
  return text.ok() ? nlohmann::json::parse(*text) : nlohmann::json();
}

inline nlohmann::json ReleasedConfig() { return ReleasedFacts()["config"]; }

inline std::map<std::string, std::vector<int64_t>> ReleasedShapes() {
  const nlohmann::json facts = ReleasedFacts();
  std::map<std::string, std::vector<int64_t>> shapes;
  const auto add = [&](const std::string& prefix, const char* group) {
    for (const auto& [name, shape] : facts["tensors"][group].items())
      shapes[prefix + name] = shape.get<std::vector<int64_t>>();
  };
  add("", "model");
  const nlohmann::json& mixers = facts["config"]["mixer_types"];
  for (size_t layer = 0; layer < mixers.size(); ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix, "every_layer");
    add(prefix, mixers[layer] == "minicpm4" ? "softmax_layer" : "linear_layer");
  }
  return shapes;
}

}  // namespace sala::recipes
