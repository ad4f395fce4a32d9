#include "data/tokenizer_files.h"

#include <nlohmann/json.hpp>

#include "core/file.h"

namespace sala::data {
namespace {

// ChatML as data/chat.cc renders it, in the template language of the exported format.
constexpr char kChatTemplate[] =
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

Status WriteIfAbsent(const std::string& path, const nlohmann::json& content) {
  return PathExists(path) ? OkStatus() : WriteFileAtomically(path, content.dump(2) + "\n");
}

}  // namespace

StatusOr<std::vector<std::string>> CopyTokenizerFiles(const std::string& from,
                                                      const std::string& to,
                                                      const std::string& without) {
  std::vector<std::string> copied;
  for (const char* name : kTokenizerFiles) {
    if (name == without || !PathExists(from + "/" + name)) continue;
    SALA_ASSIGN_OR_RETURN(const std::string content, ReadFile(from + "/" + name));
    SALA_RETURN_IF_ERROR(MakeDirectories(to));
    SALA_RETURN_IF_ERROR(WriteFileAtomically(to + "/" + name, content));
    copied.emplace_back(name);
  }
  return copied;
}

Status WriteTokenizerConfigs(const Tokenizer& tokenizer, const std::string& directory,
                             const TokenizerConfigFields& fields) {
  nlohmann::json special;
  if (!fields.unk.empty()) special["unk_token"] = fields.unk;
  if (!fields.bos.empty()) special["bos_token"] = fields.bos;
  if (!fields.eos.empty()) special["eos_token"] = fields.eos;
  if (!fields.pad.empty()) special["pad_token"] = fields.pad;
  nlohmann::json config = special;
  nlohmann::json added = nlohmann::json::object();
  nlohmann::json additional = nlohmann::json::array();
  for (const auto& [text, id] : tokenizer.added_tokens()) {
    added[std::to_string(id)] = {{"content", text}, {"lstrip", false},      {"normalized", false},
                                 {"rstrip", false}, {"single_word", false}, {"special", true}};
    additional.push_back(text);
  }
  if (!additional.empty()) special["additional_special_tokens"] = additional;
  config["tokenizer_class"] = fields.tokenizer_class;
  config["add_bos_token"] = true;
  config["add_eos_token"] = false;
  config["add_prefix_space"] = false;
  config["clean_up_tokenization_spaces"] = false;
  config["legacy"] = false;
  config["added_tokens_decoder"] = added;
  if (tokenizer.FindToken(kImStart).has_value() && tokenizer.FindToken(kImEnd).has_value())
    config["chat_template"] = kChatTemplate;
  SALA_RETURN_IF_ERROR(WriteIfAbsent(directory + "/tokenizer_config.json", config));
  return WriteIfAbsent(directory + "/special_tokens_map.json", special);
}

}  // namespace sala::data
