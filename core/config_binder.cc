// Reading and writing of structs through one Bind.
#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <set>
#include <tuple>
#include <type_traits>

#include "core/check.h"
#include "core/config.h"
#include "core/config_node.h"
#include "core/file.h"

namespace sala {
namespace {

using Node = ConfigDocument::Node;

// Shortest text that reads back as the same number; "3" for 3.0, which the reader takes as a float
// where one is wanted.
template <typename T>
std::string NumberText(T value) {
  std::array<char, 64> text{};
  const auto result = std::to_chars(text.data(), text.data() + text.size(), value);
  return {text.data(), result.ptr};
}

std::string ScalarText(bool value) { return value ? "true" : "false"; }
std::string ScalarText(int64_t value) { return NumberText(value); }
std::string ScalarText(double value) {
  SALA_CHECK(std::isfinite(value)) << "a configuration holds only finite numbers";
  return NumberText(value);
}

// Plain where every YAML reader takes it as text, else double-quoted.
std::string ScalarText(const std::string& value) {
  static const std::set<std::string> kWords = {"null", "true", "false", "yes", "no",
                                               "on",   "off",  "y",     "n"};
  std::string lower = value;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  const auto is_letter = [](unsigned char c) { return std::isalpha(c) != 0 || c == '_'; };
  const auto is_plain = [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '_' || c == '-' || c == '.' || c == '/';
  };
  if (!value.empty() && is_letter(static_cast<unsigned char>(value[0])) &&
      std::all_of(value.begin(), value.end(), is_plain) && kWords.count(lower) == 0) {
    return value;
  }
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string text = "\"";
  for (const char c : value) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      text += std::string("\\") + c;
    } else if (byte < 0x20 || byte == 0x7F) {
      text += std::string("\\x") + kDigits[byte >> 4] + kDigits[byte & 15];
    } else {
      text += c;
    }
  }
  return text + "\"";
}

template <typename T>
std::string ListText(const std::vector<T>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i > 0 ? ", " : "") + ScalarText(values[i]);
  return text + "]";
}

bool FromScalar(const Node& node, bool* value) {
  if (node.quoted || (node.scalar != "true" && node.scalar != "false")) return false;
  *value = node.scalar == "true";
  return true;
}
bool FromScalar(const Node& node, int64_t* value) {
  const auto parsed = ParseInteger(node.scalar);
  if (node.quoted || !parsed.has_value()) return false;
  *value = *parsed;
  return true;
}
bool FromScalar(const Node& node, double* value) {
  const auto parsed = ParseDouble(node.scalar);
  if (node.quoted || !parsed.has_value()) return false;
  *value = *parsed;
  return true;
}
bool FromScalar(const Node& node, std::string* value) {
  *value = node.scalar;
  return true;
}

template <typename T>
const char* ExpectedText() {
  if constexpr (std::is_same_v<T, bool>) return "true or false";
  if constexpr (std::is_same_v<T, int64_t>) return "an integer such as 4096, 7_800_000 or 4K";
  if constexpr (std::is_same_v<T, double>) return "a finite number such as 0.5 or 3e-4";
  return "text";
}

}  // namespace

struct ConfigBinder::State {
  struct Frame {
    const Node* node = nullptr;  // reading: the mapping (or list) that is bound
    std::string path;
    std::vector<std::string> keys;  // bound so far
    size_t indent = 0;              // writing
    bool dash = false;              // writing: the next line opens a list element
  };
  struct Problem {
    ConfigOrigin origin;
    std::string code;
    std::string text;
  };

  bool reading = false;
  ConfigDocument document;
  std::vector<Frame> frames;
  std::vector<Problem> problems;
  std::vector<std::unique_ptr<Node>> owned;  // empty mappings for sections that are not written
  std::string text;

  Frame& top() { return frames.back(); }

  void Report(const ConfigOrigin& origin, const std::string& code, const std::string& what) {
    problems.push_back({origin, code, OriginText(document.path(), origin) + ": " + what});
  }

  // Registers the key; the node where it is written, or nullptr after reporting a required key that
  // is not.
  const Node* Lookup(const char* key, const FieldOptions& options) {
    Frame& frame = top();
    frame.keys.emplace_back(key);
    const Node* node = frame.node->Find(key);
    if (node == nullptr && options.required) {
      Report(frame.node->origin, "CFG-MISSING",
             "`" + JoinPath(frame.path, key) + "` is required and not written");
    }
    return node;
  }

  void Line(const std::string& content) {
    Frame& frame = top();
    std::string prefix(frame.indent, ' ');
    if (frame.dash) prefix.replace(prefix.size() - 2, 2, "- ");
    frame.dash = false;
    text += prefix + content + "\n";
  }

  void WriteField(const char* key, const std::string& value) {
    Frame& frame = top();
    SALA_CHECK(std::find(frame.keys.begin(), frame.keys.end(), key) == frame.keys.end())
        << "configuration key " << JoinPath(frame.path, key) << " is bound twice";
    frame.keys.emplace_back(key);
    Line(std::string(key) + ":" + (value.empty() ? "" : " " + value));
  }

  template <typename T>
  bool ReadScalar(const Node& node, const std::string& path, T* value,
                  const FieldOptions& options) {
    T parsed{};
    if (node.kind != Node::Kind::kScalar || !FromScalar(node, &parsed)) {
      Report(node.origin, "CFG-TYPE",
             "`" + path + "`: found " + FoundText(node) + ", expected " + ExpectedText<T>());
      return false;
    }
    if constexpr (std::is_same_v<T, int64_t> || std::is_same_v<T, double>) {
      if (!(static_cast<double>(parsed) >= options.min &&
            static_cast<double>(parsed) <= options.max)) {
        Report(node.origin, "CFG-RANGE",
               "`" + path + "`: found " + ScalarText(parsed) + ", expected " + RangeText(options));
        return false;
      }
    }
    *value = std::move(parsed);
    return true;
  }

  static std::string RangeText(const FieldOptions& options) {
    if (!std::isfinite(options.max)) return "at least " + NumberText(options.min);
    if (!std::isfinite(options.min)) return "at most " + NumberText(options.max);
    return "between " + NumberText(options.min) + " and " + NumberText(options.max);
  }

  template <typename T>
  void Scalar(const char* key, T* value, const FieldOptions& options) {
    if (!reading) return WriteField(key, ScalarText(*value));
    const Node* node = Lookup(key, options);
    if (node != nullptr) ReadScalar(*node, JoinPath(top().path, key), value, options);
  }

  template <typename T>
  void Optional(const char* key, std::optional<T>* value, const FieldOptions& options) {
    if (!reading) return WriteField(key, value->has_value() ? ScalarText(**value) : "null");
    const Node* node = Lookup(key, options);
    if (node == nullptr) return;
    T parsed{};
    if (node->kind == Node::Kind::kNull) {
      value->reset();
    } else if (ReadScalar(*node, JoinPath(top().path, key), &parsed, options)) {
      *value = std::move(parsed);
    }
  }

  template <typename T>
  void Values(const char* key, std::vector<T>* values, const FieldOptions& options) {
    if (!reading) return WriteField(key, ListText(*values));
    const Node* node = Lookup(key, options);
    if (node == nullptr) return;
    const std::string path = JoinPath(top().path, key);
    if (node->kind != Node::Kind::kSequence) {
      return Report(node->origin, "CFG-TYPE",
                    "`" + path + "`: found " + FoundText(*node) + ", expected a list");
    }
    std::vector<T> parsed(node->items.size());
    bool good = true;
    for (size_t i = 0; i < parsed.size(); ++i) {
      good = ReadScalar(node->items[i], JoinPath(path, std::to_string(i)), &parsed[i], options) &&
             good;
    }
    if (good) *values = std::move(parsed);
  }

  // Starts to bind a mapping; something else there is reported and stands for an empty one.
  void EnterMap(const Node* node, const ConfigOrigin& origin, const std::string& path) {
    if (node != nullptr && node->kind != Node::Kind::kMap) {
      if (node->kind != Node::Kind::kNull) {
        Report(node->origin, "CFG-TYPE",
               "`" + path + "`: found " + FoundText(*node) + ", expected a mapping");
      }
      node = nullptr;
    }
    if (node == nullptr) {
      owned.push_back(std::make_unique<Node>());
      owned.back()->kind = Node::Kind::kMap;
      owned.back()->origin = origin;
      node = owned.back().get();
    }
    frames.push_back({node, path, {}, 0, false});
  }

  void LeaveMap() {
    const Frame frame = std::move(frames.back());
    frames.pop_back();
    for (const auto& entry : frame.node->entries) {
      if (std::find(frame.keys.begin(), frame.keys.end(), entry.key) != frame.keys.end()) continue;
      Report(entry.origin, "CFG-KEY",
             "unknown key `" + JoinPath(frame.path, Printable(entry.key)) + "`" +
                 SuggestionText(entry.key, frame.keys));
    }
  }

  // Writing: an empty mapping must be written as {}.
  void LeaveWrittenMap() {
    const Frame frame = std::move(frames.back());
    frames.pop_back();
    if (!frame.keys.empty()) return;
    if (frame.dash) {
      text += std::string(frame.indent - 2, ' ') + "- {}\n";
    } else if (!frames.empty()) {
      text.insert(text.size() - 1, " {}");  // after "key:"
    }
  }
};

ConfigBinder::ConfigBinder() : state_(std::make_unique<State>()) {}
ConfigBinder::~ConfigBinder() = default;

void ConfigBinder::Field(const char* key, bool* value, FieldOptions options) {
  state_->Scalar(key, value, options);
}
void ConfigBinder::Field(const char* key, int64_t* value, FieldOptions options) {
  state_->Scalar(key, value, options);
}
void ConfigBinder::Field(const char* key, double* value, FieldOptions options) {
  state_->Scalar(key, value, options);
}
void ConfigBinder::Field(const char* key, std::string* value, FieldOptions options) {
  state_->Scalar(key, value, options);
}
void ConfigBinder::Field(const char* key, std::vector<int64_t>* value, FieldOptions options) {
  state_->Values(key, value, options);
}
void ConfigBinder::Field(const char* key, std::vector<double>* value, FieldOptions options) {
  state_->Values(key, value, options);
}
void ConfigBinder::Field(const char* key, std::vector<std::string>* value, FieldOptions options) {
  state_->Values(key, value, options);
}
void ConfigBinder::Field(const char* key, std::optional<int64_t>* value, FieldOptions options) {
  state_->Optional(key, value, options);
}
void ConfigBinder::Field(const char* key, std::optional<double>* value, FieldOptions options) {
  state_->Optional(key, value, options);
}
void ConfigBinder::Field(const char* key, std::optional<std::string>* value, FieldOptions options) {
  state_->Optional(key, value, options);
}

void ConfigBinder::EnumField(const char* key, std::string* text,
                             const std::vector<std::string>& allowed, FieldOptions options) {
  if (!state_->reading) {
    SALA_CHECK(std::find(allowed.begin(), allowed.end(), *text) != allowed.end())
        << "configuration key " << key << " holds a value without a name";
    return state_->WriteField(key, ScalarText(*text));
  }
  const Node* node = state_->Lookup(key, options);
  if (node == nullptr) return;
  const std::string path = JoinPath(state_->top().path, key);
  std::string found;
  if (!state_->ReadScalar(*node, path, &found, options)) return;
  if (std::find(allowed.begin(), allowed.end(), found) != allowed.end()) {
    *text = found;
    return;
  }
  std::string names;
  for (const std::string& name : allowed) names += (names.empty() ? "" : ", ") + name;
  const std::string nearest = NearestWord(found, allowed);
  state_->Report(node->origin, "CFG-RANGE",
                 "`" + path + "`: found " + FoundText(*node) + ", expected one of " + names +
                     (nearest.empty() ? "" : "; did you mean `" + nearest + "`?"));
}

bool ConfigBinder::BeginSection(const char* key, FieldOptions options) {
  State::Frame& frame = state_->top();
  if (state_->reading) {
    const Node* node = state_->Lookup(key, options);
    state_->EnterMap(node, node == nullptr ? frame.node->origin : node->origin,
                     JoinPath(frame.path, key));
    return true;
  }
  const size_t indent = frame.indent + 2;
  const std::string path = JoinPath(frame.path, key);
  state_->WriteField(key, "");
  state_->frames.push_back({nullptr, path, {}, indent, false});
  return true;
}

void ConfigBinder::EndSection() {
  if (state_->reading) {
    state_->LeaveMap();
  } else {
    state_->LeaveWrittenMap();
  }
}

int64_t ConfigBinder::BeginList(const char* key, int64_t size, FieldOptions options) {
  State::Frame& frame = state_->top();
  const std::string path = JoinPath(frame.path, key);
  if (!state_->reading) {
    const size_t indent = frame.indent + 4;  // "  - " before each element's keys
    state_->WriteField(key, size == 0 ? "[]" : "");
    state_->frames.push_back({nullptr, path, {}, indent, false});
    return size;
  }
  const Node* node = state_->Lookup(key, options);
  if (node == nullptr) return -1;
  if (node->kind != Node::Kind::kSequence) {
    state_->Report(node->origin, "CFG-TYPE",
                   "`" + path + "`: found " + FoundText(*node) + ", expected a list");
    return -1;
  }
  state_->frames.push_back({node, path, {}, 0, false});
  return static_cast<int64_t>(node->items.size());
}

bool ConfigBinder::BeginItem(int64_t index) {
  const State::Frame& list = state_->top();
  const std::string path = JoinPath(list.path, std::to_string(index));
  if (state_->reading) {
    const Node& item = list.node->items[static_cast<size_t>(index)];
    state_->EnterMap(&item, item.origin, path);
  } else {
    state_->frames.push_back({nullptr, path, {}, list.indent, true});
  }
  return true;
}

void ConfigBinder::EndList() { state_->frames.pop_back(); }

void ConfigBinder::Absent(const char* key, FieldOptions options) {
  if (state_->reading) {
    state_->Lookup(key, options);
  } else {
    state_->WriteField(key, "null");
  }
}

bool ConfigBinder::reading() const { return state_->reading; }

bool ConfigBinder::Present(const char* key) const {
  return state_->reading && state_->top().node->Find(key) != nullptr;
}

bool ConfigBinder::HasValue(const char* key) const {
  return Present(key) && state_->top().node->Find(key)->kind != Node::Kind::kNull;
}

void ConfigBinder::Error(const char* key, const std::string& code, const std::string& text) {
  if (!state_->reading) return;
  const State::Frame& frame = state_->top();
  const Node* node = frame.node->Find(key);
  state_->Report(node == nullptr ? frame.node->origin : node->origin, code,
                 "`" + JoinPath(frame.path, key) + "`: " + text);
}

std::unique_ptr<ConfigBinder> ConfigBinderAccess::Reader(const ConfigDocument& document) {
  std::unique_ptr<ConfigBinder> binder(new ConfigBinder);
  binder->state_->reading = true;
  binder->state_->document = document;
  binder->state_->frames.push_back({document.root().get(), "", {}, 0, false});
  return binder;
}

std::unique_ptr<ConfigBinder> ConfigBinderAccess::Writer() {
  std::unique_ptr<ConfigBinder> binder(new ConfigBinder);
  binder->state_->frames.push_back({});
  return binder;
}

Status ConfigBinderAccess::Finish(ConfigBinder& binder) {
  ConfigBinder::State& state = *binder.state_;
  state.LeaveMap();
  SALA_CHECK(state.frames.empty()) << "a section or list was begun and not ended";
  if (state.problems.empty()) return OkStatus();
  std::stable_sort(state.problems.begin(), state.problems.end(), [](const auto& a, const auto& b) {
    // What is missing comes last: it is often there, but misspelt.
    const auto place = [](const auto& p) {
      return std::make_tuple(p.code == "CFG-MISSING", !p.origin.set.empty(), p.origin.line,
                             p.origin.column);
    };
    return place(a) < place(b);
  });
  std::string text = state.problems[0].text;
  for (size_t i = 1; i < state.problems.size(); ++i) {
    text += "\n" + state.problems[i].code + ": " + state.problems[i].text;
  }
  return MakeError(ExitCode::kConfig, state.problems[0].code, text);
}

std::string ConfigBinderAccess::Text(const ConfigBinder& binder) { return binder.state_->text; }

}  // namespace sala
