#include "data/hf_json.h"

#include <algorithm>
#include <string>

#include "core/file.h"
#include "core/json.h"

namespace sala::data {
namespace {

const nlohmann::json kNull;

// A value for a message: Printable cuts it, and of a vocabulary nobody wants a copy first.
std::string Shown(const nlohmann::json& json) {
  if (json.is_object() && json.size() > 8)
    return "an object of " + std::to_string(json.size()) + " members";
  if (json.is_array() && json.size() > 8)
    return "a list of " + std::to_string(json.size()) + " values";
  return Printable(DumpJson(json));
}

}  // namespace

HfNode HfNode::operator[](const std::string& key) const {
  const nlohmann::json* found = &kNull;
  if (json_->is_object()) {
    if (const auto member = json_->find(key); member != json_->end()) found = &*member;
  }
  return {found, file_, path_.empty() ? key : path_ + "." + key};
}

StatusOr<std::vector<HfNode>> HfNode::List() const {
  if (!json_->is_array()) return Malformed("a list");
  std::vector<HfNode> nodes;
  nodes.reserve(json_->size());
  for (size_t i = 0; i < json_->size(); ++i)
    nodes.emplace_back(&(*json_)[i], file_, path_ + "[" + std::to_string(i) + "]");
  return nodes;
}

StatusOr<std::string> HfNode::Text() const {
  if (!json_->is_string()) return Malformed("a text");
  return json_->get<std::string>();
}

StatusOr<bool> HfNode::Flag() const {
  if (!json_->is_boolean()) return Malformed("true or false");
  return json_->get<bool>();
}

StatusOr<bool> HfNode::Flag(bool absent) const { return is_null() ? absent : Flag(); }

StatusOr<int64_t> HfNode::Number(uint64_t limit) const {
  const bool fits = json_->is_number_unsigned()
                        ? json_->get<uint64_t>() < limit
                        : json_->is_number_integer() && json_->get<int64_t>() >= 0;
  if (!fits) return Malformed("an integer from 0 to " + std::to_string(limit - 1));
  return json_->get<int64_t>();
}

StatusOr<std::string> HfNode::Type() const {
  if (!json_->is_object()) return Malformed("an object with a type, or null");
  return (*this)["type"].Text();
}

Status HfNode::OnlyKeys(std::initializer_list<const char*> known) const {
  if (!json_->is_object()) return Malformed("an object");
  for (const auto& item : json_->items()) {
    const std::string& key = item.key();
    const bool is_known =
        std::any_of(known.begin(), known.end(), [&](const char* name) { return key == name; });
    if (!is_known) return (*this)[key].Unsupported("there is no such member");
  }
  return OkStatus();
}

Status HfNode::Unsupported(std::string_view what_is_read) const {
  return MakeError(ExitCode::kData, "TOK-UNSUPPORTED",
                   *file_ + ": " + Printable(path_) + " is " + Shown(*json_) +
                       ", which is not read here; " + std::string(what_is_read));
}

Status HfNode::Malformed(std::string_view expected) const {
  return MakeError(ExitCode::kData, "TOK-FORMAT",
                   *file_ + ": " + (path_.empty() ? "the file" : Printable(path_)) + " is " +
                       Shown(*json_) + ", expected " + std::string(expected) +
                       "; copy the tokenizer's files again");
}

StatusOr<LiteralReplace> ReadLiteralReplace(const HfNode& node) {
  SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "pattern", "content"}));
  const HfNode pattern = node["pattern"];
  if (pattern.json().is_object() && pattern["String"].is_null())
    return pattern.Unsupported("a literal text is, {\"String\": ...}");
  SALA_RETURN_IF_ERROR(pattern.OnlyKeys({"String"}));
  LiteralReplace replace;
  SALA_ASSIGN_OR_RETURN(replace.pattern, pattern["String"].Text());
  SALA_ASSIGN_OR_RETURN(replace.content, node["content"].Text());
  if (replace.pattern.empty()) return pattern.Unsupported("texts that are not empty are");
  return replace;
}

}  // namespace sala::data
