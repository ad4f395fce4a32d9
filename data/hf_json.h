// A value of a tokenizer.json together with its place in the file, so that every error names the
// file, the path of the value and the value itself.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace sala::data {

class HfNode {
 public:
  // `json` and `file` outlive the node.
  HfNode(const nlohmann::json* json, const std::string* file, std::string path = {})
      : json_(json), file_(file), path_(std::move(path)) {}

  const nlohmann::json& json() const { return *json_; }
  bool is_null() const { return json_->is_null(); }
  HfNode operator[](const std::string& key) const;  // a null node where there is no such member
  // The elements of a list; TOK-FORMAT where it is none.
  StatusOr<std::vector<HfNode>> List() const;
  StatusOr<std::string> Text() const;
  StatusOr<bool> Flag() const;
  StatusOr<bool> Flag(bool absent) const;  // `absent` for null
  // An integer in [0, limit).
  StatusOr<int64_t> Number(uint64_t limit) const;
  // The "type" of a component. TOK-FORMAT where this is no object or has none.
  StatusOr<std::string> Type() const;
  // TOK-UNSUPPORTED at the first member that is not in `known`; TOK-FORMAT where this is no object.
  Status OnlyKeys(std::initializer_list<const char*> known) const;

  // Something that may well be a tokenizer, but not one that is read here.
  Status Unsupported(std::string_view what_is_read) const;
  // Something that no tokenizer.json has.
  Status Malformed(std::string_view expected) const;

 private:
  const nlohmann::json* json_;
  const std::string* file_;
  std::string path_;
};

// {"type": "Replace", "pattern": {"String": ...}, "content": ...}, as normalizers and decoders have
// it.
struct LiteralReplace {
  std::string pattern;  // not empty
  std::string content;
};
StatusOr<LiteralReplace> ReadLiteralReplace(const HfNode& node);

}  // namespace sala::data
