#include "recipes/export_stops.h"

#include <algorithm>
#include <utility>

#include "data/chat.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {
namespace {

// Those of `more` that are not there yet, behind the others.
std::vector<int64_t> Joined(std::vector<int64_t> ids, const std::vector<int32_t>& more) {
  for (const int32_t id : more) {
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

}  // namespace

std::vector<int64_t> EosIds(const model::ModelConfig& config, const data::Tokenizer* tokenizer) {
  std::vector<int64_t> ids = {config.eos_token_id};
  if (tokenizer == nullptr) return ids;
  return Joined(Joined(std::move(ids), {tokenizer->eos_id()}), data::TurnEndTokens(*tokenizer));
}

std::string WithTurnEnds(const std::string& text, const model::ModelConfig& config,
                         const data::Tokenizer& tokenizer) {
  auto json = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return text;
  std::vector<int64_t> ids;
  const nlohmann::ordered_json eos = json.value("eos_token_id", nlohmann::ordered_json());
  for (const auto& id : eos.is_array() ? eos : nlohmann::ordered_json::array({eos})) {
    if (id.is_number_integer()) ids.push_back(id.get<int64_t>());
  }
  if (ids.empty()) ids = {config.eos_token_id};
  const std::vector<int64_t> all = Joined(ids, data::TurnEndTokens(tokenizer));
  if (all == ids) return text;
  json["eos_token_id"] = all;
  return json.dump(2) + "\n";
}

}  // namespace sala::recipes
