#include "recipes/export_stops.h"

#include <algorithm>
#include <utility>

#include "core/file.h"
#include "core/json.h"
#include "data/chat.h"
#include "nlohmann/json.hpp"
#include "recipes/export_base.h"

namespace sala::recipes {
namespace {

// Those of `more` that are not there yet, behind the others.
std::vector<int64_t> Joined(std::vector<int64_t> ids, const std::vector<int32_t>& more) {
  for (const int32_t id : more) {
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  }
  return ids;
}

// Of a generation_config.json.
template <typename Json>
std::vector<int64_t> EosOf(const Json& json) {
  std::vector<int64_t> ids;
  const Json eos = json.value("eos_token_id", Json());
  for (const auto& id : eos.is_array() ? eos : Json::array({eos})) {
    if (id.is_number_integer()) ids.push_back(id.template get<int64_t>());
  }
  return ids;
}

}  // namespace

std::vector<int64_t> EosIds(const model::ModelConfig& config, const data::Tokenizer* tokenizer) {
  std::vector<int64_t> ids = {config.eos_token_id};
  if (tokenizer == nullptr) return ids;
  return Joined(Joined(std::move(ids), {tokenizer->eos_id()}), data::TurnEndTokens(*tokenizer));
}

std::vector<int64_t> StopIds(const LoadedModel& model, const std::string& path,
                             const data::Tokenizer& tokenizer) {
  std::vector<int64_t> ids = EosIds(model.config, &tokenizer);
  std::string text;
  if (auto file = ReadFile(path + "/" + kGenerationConfig); file.ok()) {
    text = std::move(file).value();
  } else if (model.source && model.source->generation_config) {
    text = *model.source->generation_config;
  }
  const nlohmann::json json = ParseJson(text);
  if (!json.is_object()) return ids;
  std::vector<int32_t> more;
  for (const int64_t id : EosOf(json)) {
    if (id < model.config.vocab_size) more.push_back(static_cast<int32_t>(id));
  }
  return Joined(std::move(ids), more);
}

std::string WithTurnEnds(const std::string& text, const model::ModelConfig& config,
                         const data::Tokenizer& tokenizer) {
  auto json = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return text;
  std::vector<int64_t> ids = EosOf(json);
  if (ids.empty()) ids = {config.eos_token_id};
  const std::vector<int64_t> all = Joined(ids, data::TurnEndTokens(tokenizer));
  if (all == ids) return text;
  json["eos_token_id"] = all;
  return json.dump(2) + "\n";
}

}  // namespace sala::recipes
