// The node tree behind ConfigDocument; included by the config*.cc files only.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/config.h"

namespace sala {

// Where something is written: a place in the file, or a --set argument.
struct ConfigOrigin {
  std::string set;  // "--set a.b=c"; empty for the file
  int line = 1;     // counted from 1
  int column = 1;
};

struct ConfigDocument::Node {
  enum class Kind { kNull, kScalar, kSequence, kMap };

  struct Entry;

  Kind kind = Kind::kNull;
  ConfigOrigin origin;
  std::string scalar;
  bool quoted = false;
  std::vector<Node> items;
  std::vector<Entry> entries;  // in the order of the file

  const Node* Find(const std::string& key) const;
  const Entry* FindEntry(const std::string& key) const;
};

struct ConfigDocument::Node::Entry {
  std::string key;
  ConfigOrigin origin;  // of the key
  Node value;
};

// "config.yaml:3:5" or "`--set a.b=c`".
std::string OriginText(const std::string& path, const ConfigOrigin& origin);

// "a.b" of "a" and "b"; "b" of "" and "b".
std::string JoinPath(const std::string& path, const std::string& key);

// "text `abc`", "a list", "a mapping", "nothing".
std::string FoundText(const ConfigDocument::Node& node);

// "; did you mean `x`?" or "; valid are: a, b".
std::string SuggestionText(const std::string& word, const std::vector<std::string>& candidates);

// A decimal number in plain or exponent notation, underscores between digits; nullopt when it is
// none, or not finite.
std::optional<double> ParseDouble(const std::string& text);

}  // namespace sala
