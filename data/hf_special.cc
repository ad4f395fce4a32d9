#include "data/hf_special.h"

#include <array>
#include <utility>

#include "core/file.h"
#include "core/json.h"

namespace sala::data {
namespace {

struct Wanted {
  const char* token;  // the key of its name
  const char* id;     // the key of its id
  int32_t HfSpecialIds::*place;
  bool must_exist;
};
constexpr std::array<Wanted, 4> kWanted = {{
    {"bos_token", "bos_token_id", &HfSpecialIds::bos, true},
    {"eos_token", "eos_token_id", &HfSpecialIds::eos, true},
    {"pad_token", "pad_token_id", &HfSpecialIds::pad, false},
    {"unk_token", nullptr, &HfSpecialIds::unk, false},
}};

constexpr const char* kTokenizerConfig = "tokenizer_config.json";

// Whether texts do not begin with bos, whatever ids the model's files name: it was left out when
// the model was trained.
bool SaysNoBos(const nlohmann::json& tokenizer_config) {
  const auto token = tokenizer_config.find("bos_token");
  const auto added = tokenizer_config.find("add_bos_token");
  return (token != tokenizer_config.end() && token->is_null()) ||
         (added != tokenizer_config.end() && *added == false);
}

StatusOr<nlohmann::json> ReadObject(const std::string& path) {
  if (!PathExists(path)) return nlohmann::json::object();
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  nlohmann::json json = ParseJson(text);
  if (!json.is_object()) {
    return MakeError(ExitCode::kData, "TOK-FORMAT",
                     path + ": not a JSON object of " + std::to_string(text.size()) +
                         " bytes; copy the tokenizer's files again");
  }
  return json;
}

}  // namespace

StatusOr<HfSpecialIds> ReadSpecialIds(
    const std::string& directory, int64_t vocab_size,
    const std::function<std::optional<int32_t>(const std::string&)>& find) {
  HfSpecialIds ids;
  bool no_bos = false;
  for (const char* name : {kTokenizerConfig, "special_tokens_map.json"}) {
    const std::string path = directory + "/" + name;
    SALA_ASSIGN_OR_RETURN(const nlohmann::json json, ReadObject(path));
    if (name == kTokenizerConfig) no_bos = SaysNoBos(json);
    for (const Wanted& wanted : kWanted) {
      if (no_bos && wanted.place == &HfSpecialIds::bos) continue;
      const auto value = json.find(wanted.token);
      if (ids.*wanted.place >= 0 || value == json.end() || value->is_null()) continue;
      HfNode token(&*value, &path, wanted.token);
      if (value->is_object()) token = token["content"];
      SALA_ASSIGN_OR_RETURN(const std::string text, token.Text());
      const std::optional<int32_t> id = find(text);
      if (id.has_value()) ids.*wanted.place = *id;
      // A pad token that the makers never needed is often named and not there.
      if (!id.has_value() && wanted.must_exist) return token.Malformed("a token of tokenizer.json");
    }
  }
  for (const char* name : {"generation_config.json", "config.json"}) {
    const std::string path = directory + "/" + name;
    SALA_ASSIGN_OR_RETURN(const nlohmann::json json, ReadObject(path));
    for (const Wanted& wanted : kWanted) {
      if (wanted.id == nullptr || ids.*wanted.place >= 0) continue;
      if (no_bos && wanted.place == &HfSpecialIds::bos) continue;
      auto value = json.find(wanted.id);
      if (value == json.end() || value->is_null()) continue;
      // Several ids that end a text: the first is the one to write.
      const nlohmann::json& first = value->is_array() && !value->empty() ? value->front() : *value;
      if (first.is_number_integer() && first.get<int64_t>() == -1) continue;
      if (!first.is_number_unsigned() ||
          first.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
        return MakeError(ExitCode::kData, "TOK-VOCAB",
                         path + ": " + wanted.id + " is " + Printable(first.dump()) +
                             ", the tokenizer beside it has ids from 0 to " +
                             std::to_string(vocab_size - 1) +
                             "; put the tokenizer there that belongs to the model");
      }
      ids.*wanted.place = first.get<int32_t>();
      ids.of_model = true;
    }
  }
  return ids;
}

StatusOr<HfTemplate> ReadPostProcessor(const HfNode& post_processor, int64_t vocab_size) {
  HfTemplate made;
  if (!post_processor.is_null()) SALA_RETURN_IF_ERROR(made.Add(post_processor, vocab_size));
  return made;
}

Status HfTemplate::Add(const HfNode& node, int64_t vocab_size) {
  SALA_ASSIGN_OR_RETURN(const std::string type, node.Type());
  if (type == "ByteLevel") {
    return node.OnlyKeys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
  }
  if (type == "Sequence") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "processors"}));
    SALA_ASSIGN_OR_RETURN(const auto list, node["processors"].List());
    for (const HfNode& each : list) SALA_RETURN_IF_ERROR(Add(each, vocab_size));
    return OkStatus();
  }
  if (type != "TemplateProcessing")
    return node["type"].Unsupported("TemplateProcessing, ByteLevel, Sequence and null are");
  // The library would take what the first one made for several texts.
  if (text_seen) return node["type"].Unsupported("one TemplateProcessing is");
  SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "single", "pair", "special_tokens"}));
  SALA_ASSIGN_OR_RETURN(const auto items, node["single"].List());
  for (const HfNode& item : items) {
    SALA_RETURN_IF_ERROR(item.OnlyKeys({"SpecialToken", "Sequence"}));
    if (!item["Sequence"].is_null()) {
      SALA_ASSIGN_OR_RETURN(const std::string id, item["Sequence"]["id"].Text());
      if (id != "A" || text_seen) return item.Unsupported("the text A, once, is");
      text_seen = true;
      continue;
    }
    SALA_ASSIGN_OR_RETURN(const std::string name, item["SpecialToken"]["id"].Text());
    SALA_ASSIGN_OR_RETURN(const auto ids, node["special_tokens"][name]["ids"].List());
    for (const HfNode& id : ids) {
      SALA_ASSIGN_OR_RETURN(const int64_t value, id.Number(static_cast<uint64_t>(vocab_size)));
      (text_seen ? after : before).push_back(static_cast<int32_t>(value));
    }
  }
  return text_seen ? OkStatus() : node["single"].Malformed("a list with the text A in it");
}

}  // namespace sala::data
