#include "recipes/export_base.h"

#include <algorithm>
#include <cctype>

#include "core/file.h"
#include "core/json.h"
#include "data/tokenizer_files.h"

namespace sala::recipes {
namespace {

bool IsCode(const std::string& name) {
  return name.size() > 3 && name.compare(name.size() - 3, 3, ".py") == 0;
}

bool IsLicence(const std::string& name) {
  std::string upper = name;
  std::transform(upper.begin(), upper.end(), upper.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  return upper.rfind("LICENSE", 0) == 0 || upper.rfind("LICENCE", 0) == 0 ||
         upper.rfind("NOTICE", 0) == 0;
}

bool IsOfTokenizer(const std::string& name) {
  return std::find(data::kTokenizerFiles.begin(), data::kTokenizerFiles.end(), name) !=
         data::kTokenizerFiles.end();
}

constexpr char kChatTemplate[] = "chat_template.jinja";

// A file of its own would be read in place of that.
bool HasChatTemplate(const std::string& directory) {
  const auto text = ReadFile(directory + "/tokenizer_config.json");
  const nlohmann::json config = text.ok() ? ParseJson(*text) : nlohmann::json();
  return config.is_object() && config.contains("chat_template") &&
         !config["chat_template"].is_null();
}

bool HasTokenizer(const std::string& directory, const data::Tokenizer* tokenizer) {
  if (tokenizer == nullptr) return false;
  const auto own = data::LoadTokenizer(directory);
  return own.ok() && (*own)->fingerprint() == tokenizer->fingerprint();
}

}  // namespace

bool BaseFolder::has_code() const { return std::any_of(files.begin(), files.end(), IsCode); }
bool BaseFolder::Has(const std::string& name) const {
  return std::find(files.begin(), files.end(), name) != files.end();
}

StatusOr<BaseFolder> ReadBase(const std::string& directory, const std::string& model_type,
                              const data::Tokenizer* tokenizer) {
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(directory + "/config.json"));
  const nlohmann::json config = ParseJson(text);
  const std::string type =
      config.is_object() && config.contains("model_type") && config["model_type"].is_string()
          ? config["model_type"].get<std::string>()
          : "";
  if (type != model_type) {
    return MakeError(ExitCode::kData, "EXP-BASE",
                     Printable(directory) + "/config.json: model_type: found '" + Printable(type) +
                         "', expected '" + model_type +
                         "', which the exported model is; name a folder of such a model");
  }
  BaseFolder base;
  base.directory = directory;
  const bool same_tokenizer = HasTokenizer(directory, tokenizer);
  for (const std::string& name : names) {
    if (IsDirectory(directory + "/" + name)) continue;
    if (IsOfTokenizer(name)) {
      (same_tokenizer ? base.files : base.left_out).push_back(name);
    } else if (IsCode(name) || IsLicence(name) || name == kGenerationConfig) {
      base.files.push_back(name);
    }
  }
  if (base.has_code() && config.contains("auto_map") && config["auto_map"].is_object())
    base.auto_map = config["auto_map"];
  return base;
}

StatusOr<std::vector<std::string>> TakeFromBase(const BaseFolder& base, const std::string& to) {
  std::vector<std::string> taken;
  const bool has_template = HasChatTemplate(to);
  for (const std::string& name : base.files) {
    if (PathExists(to + "/" + name) || (has_template && name == kChatTemplate)) continue;
    SALA_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(base.directory + "/" + name));
    SALA_RETURN_IF_ERROR(WriteFileAtomically(to + "/" + name, bytes));
    taken.push_back(name);
  }
  return taken;
}

}  // namespace sala::recipes
