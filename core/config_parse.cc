// YAML text and --set arguments -> node tree. yaml-cpp's own node layer accepts duplicate keys and
// guesses number types, so only its event interface is used.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <sstream>

#include "core/check.h"
#include "core/config.h"
#include "core/config_node.h"
#include "core/file.h"

namespace sala {
namespace {

using Node = ConfigDocument::Node;

Status ConfigError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kConfig, code, text);
}

// Builds the tree from events; keeps the first error and ignores what follows it.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(std::string path, std::string set) : path_(std::move(path)), set_(std::move(set)) {}

  Node TakeRoot() { return std::move(root_); }
  const Status& status() const { return status_; }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1)
      Fail(mark, "CFG-SYNTAX", "a second YAML document starts here; one is allowed");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Check(mark, "?", anchor);
    AddLeaf(mark, Node::Kind::kNull, "", false);
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    Fail(mark, "CFG-SYNTAX", "aliases (*name) are not supported; write the value out");
    AddLeaf(mark, Node::Kind::kNull, "", false);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    Check(mark, tag, anchor);
    AddLeaf(mark, Node::Kind::kScalar, value, tag == "!");
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Check(mark, tag, anchor);
    Open(mark, Node::Kind::kSequence);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Check(mark, tag, anchor);
    Open(mark, Node::Kind::kMap);
  }
  void OnMapEnd() override { Close(); }

 private:
  struct Frame {
    Node node;
    bool has_key = false;
    std::string key;
    ConfigOrigin key_origin;
  };

  ConfigOrigin At(const YAML::Mark& mark) const { return {set_, mark.line + 1, mark.column + 1}; }

  void Fail(const YAML::Mark& mark, const std::string& code, const std::string& text) {
    if (!status_.ok()) return;
    status_ =
        ConfigError(set_.empty() ? code : "CFG-SET", OriginText(path_, At(mark)) + ": " + text);
  }

  // "?": no tag; "!": quoted.
  void Check(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (anchor != 0)
      Fail(mark, "CFG-SYNTAX", "anchors (&name) are not supported; write the value out");
    if (tag != "?" && tag != "!" && !tag.empty()) {
      Fail(mark, "CFG-SYNTAX", "tags are not supported: found `" + Printable(tag) + "`");
    }
  }

  Node MakeNode(const YAML::Mark& mark, Node::Kind kind) const {
    Node node;
    node.kind = kind;
    node.origin = At(mark);
    return node;
  }

  bool WantsKey() const {
    return !stack_.empty() && stack_.back().node.kind == Node::Kind::kMap && !stack_.back().has_key;
  }

  void AddLeaf(const YAML::Mark& mark, Node::Kind kind, const std::string& value, bool quoted) {
    if (WantsKey()) {
      if (kind != Node::Kind::kScalar) Fail(mark, "CFG-SYNTAX", "a key is missing before `:`");
      Frame& frame = stack_.back();
      frame.has_key = true;
      frame.key = value;
      frame.key_origin = At(mark);
      return;
    }
    Node node = MakeNode(mark, kind);
    node.scalar = value;
    node.quoted = quoted;
    Attach(std::move(node));
  }

  void Open(const YAML::Mark& mark, Node::Kind kind) {
    if (WantsKey()) {
      Fail(mark, "CFG-SYNTAX", "a key must be plain text, found a list or a mapping");
      stack_.back().has_key = true;
      stack_.back().key_origin = At(mark);
      key_depth_ = stack_.size();
    }
    stack_.push_back({MakeNode(mark, kind), false, "", {}});
  }

  void Close() {
    Node node = std::move(stack_.back().node);
    stack_.pop_back();
    if (key_depth_ == stack_.size() && key_depth_ > 0) {
      key_depth_ = 0;  // the bad key is complete; its value comes next
      return;
    }
    Attach(std::move(node));
  }

  void Attach(Node node) {
    if (stack_.empty()) {
      root_ = std::move(node);
      return;
    }
    Frame& frame = stack_.back();
    if (frame.node.kind == Node::Kind::kSequence) {
      frame.node.items.push_back(std::move(node));
      return;
    }
    frame.has_key = false;
    if (const auto* first = frame.node.FindEntry(frame.key)) {
      if (status_.ok()) {
        status_ =
            ConfigError("CFG-DUP", OriginText(path_, frame.key_origin) + ": key `" +
                                       Printable(frame.key) + "` is written twice, first at " +
                                       OriginText(path_, first->origin) + "; remove one of them");
      }
      return;
    }
    frame.node.entries.push_back({frame.key, frame.key_origin, std::move(node)});
  }

  std::string path_;
  std::string set_;
  Status status_;
  Node root_;
  std::vector<Frame> stack_;
  size_t key_depth_ = 0;  // depth of the mapping whose (invalid) key is a collection
  int documents_ = 0;
};

StatusOr<Node> ParseYaml(const std::string& text, const std::string& path, const std::string& set) {
  TreeBuilder builder(path, set);
  try {
    std::istringstream in(text);
    YAML::Parser parser(in);
    // Not beyond the first error: of some texts (",") the parser makes documents without end.
    while (builder.status().ok() && parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& e) {
    const ConfigOrigin origin{set, e.mark.line + 1, e.mark.column + 1};
    return ConfigError(set.empty() ? "CFG-SYNTAX" : "CFG-SET",
                       OriginText(path, origin) + ": " + Printable(e.msg));
  }
  SALA_RETURN_IF_ERROR(builder.status());
  return builder.TakeRoot();
}

Status SetError(const std::string& set, const std::string& text) {
  return ConfigError("CFG-SET", "`" + Printable(set) + "`: " + text);
}

// The child `key` of a mapping or list, made in a mapping where it is missing.
StatusOr<Node*> Child(Node* node, const std::string& key, const std::string& set) {
  const ConfigOrigin origin{set, 1, 1};
  if (node->kind == Node::Kind::kSequence) {
    const auto index = ParseInteger(key);
    const auto size = static_cast<int64_t>(node->items.size());
    if (!index.has_value() || *index < 0 || *index >= size) {
      return SetError(set, "`" + Printable(key) + "` is no element of a list of " +
                               std::to_string(size) + "; elements are counted from 0");
    }
    return &node->items[static_cast<size_t>(*index)];
  }
  if (node->kind == Node::Kind::kScalar) {
    return SetError(set,
                    "`" + Printable(key) + "` cannot be set inside the value " + FoundText(*node));
  }
  if (node->kind == Node::Kind::kNull) {
    node->kind = Node::Kind::kMap;
    node->origin = origin;
  }
  for (auto& entry : node->entries) {
    if (entry.key == key) return &entry.value;
  }
  node->entries.push_back({key, origin, Node{}});
  node->entries.back().value.origin = origin;
  return &node->entries.back().value;
}

Status ApplySet(const std::string& argument, Node* root) {
  const std::string set = "--set " + argument;
  const size_t equals = argument.find('=');
  if (equals == std::string::npos || equals == 0) return SetError(set, "expected --set a.b=value");
  SALA_ASSIGN_OR_RETURN(Node value, ParseYaml(argument.substr(equals + 1), "", set));
  value.origin.set = set;  // an empty value has no event and so no origin of its own
  std::istringstream keys(argument.substr(0, equals) + ".");
  Node* node = root;
  for (std::string key; std::getline(keys, key, '.');) {
    if (key.empty()) return SetError(set, "an empty name in the path; expected --set a.b=value");
    SALA_ASSIGN_OR_RETURN(node, Child(node, key, set));
  }
  *node = std::move(value);
  return OkStatus();
}

}  // namespace

const Node::Entry* Node::FindEntry(const std::string& key) const {
  for (const Entry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

const Node* Node::Find(const std::string& key) const {
  const Entry* entry = FindEntry(key);
  return entry == nullptr ? nullptr : &entry->value;
}

StatusOr<ConfigDocument> ConfigDocument::Load(const std::string& path,
                                              const std::vector<std::string>& sets) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return Parse(text, path, sets);
}

StatusOr<ConfigDocument> ConfigDocument::Parse(const std::string& text, const std::string& name,
                                               const std::vector<std::string>& sets) {
  SALA_ASSIGN_OR_RETURN(Node root, ParseYaml(text, name, ""));
  if (root.kind == Node::Kind::kNull) root.kind = Node::Kind::kMap;  // an empty file
  if (root.kind != Node::Kind::kMap) {
    return ConfigError("CFG-TYPE", OriginText(name, root.origin) + ": found " + FoundText(root) +
                                       ", expected a mapping of keys to values");
  }
  for (const std::string& set : sets) SALA_RETURN_IF_ERROR(ApplySet(set, &root));
  ConfigDocument document;
  document.path_ = name;
  document.root_ = std::make_shared<const Node>(std::move(root));
  return document;
}

}  // namespace sala
