// Strict YAML configuration bound to plain structs.
//
//   struct OptimizerConfig {
//     double peak_lr = 1e-3;
//     int64_t warmup_steps = 0;
//     void Bind(ConfigBinder& b) {
//       b.Field("peak_lr", &peak_lr, {.min = 0});
//       b.Field("warmup_steps", &warmup_steps, {.min = 0});
//     }
//   };
//   SALA_ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::Load("stable.yaml",
//   {"optimizer.peak_lr=2e-3"})); SALA_RETURN_IF_ERROR(BindConfig(doc, &config));   // every key
//   checked std::string resolved = EmitConfig(config);        // YAML of every value, defaults
//   included
//
// One Bind serves reading and writing. Errors (exit 78): CFG-SYNTAX, CFG-KEY (unknown, with the
// nearest valid key), CFG-DUP, CFG-TYPE, CFG-RANGE, CFG-MISSING, CFG-CONFLICT, CFG-SET (bad --set);
// each names file:line:column (or the --set argument) and the dotted path. All errors of a document
// are reported together, in the order of the file.
//
// Integers accept 7_800_000 and the binary suffixes K, M, G, T (4K = 4096, 1M = 1024 * 1024):
// lengths are binary in this field. Leading zeros are decimal (010 is ten); 0x, fractions and
// exponents are refused. Floats accept integers, 1e9 and 3e-4; nan and inf are refused. Quoted
// values are text, never numbers. Anchors, aliases and tags are refused.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/status.h"

namespace sala {

class ConfigDocument {
 public:
  // `sets`: "a.b=c" overrides in order (list elements as a.0.b); the value is parsed as YAML; they
  // may add keys.
  static StatusOr<ConfigDocument> Load(const std::string& path,
                                       const std::vector<std::string>& sets = {});
  static StatusOr<ConfigDocument> Parse(const std::string& text, const std::string& name,
                                        const std::vector<std::string>& sets = {});
  const std::string& path() const { return path_; }

  struct Node;  // hides yaml-cpp
  const std::shared_ptr<const Node>& root() const { return root_; }

 private:
  std::string path_;
  std::shared_ptr<const Node> root_;
};

struct FieldOptions {
  bool required = false;
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
};

class ConfigBinder {
 public:
  ConfigBinder(const ConfigBinder&) = delete;
  ConfigBinder& operator=(const ConfigBinder&) = delete;
  ~ConfigBinder();

  void Field(const char* key, bool* value, FieldOptions options = {});
  void Field(const char* key, int64_t* value, FieldOptions options = {});
  void Field(const char* key, double* value, FieldOptions options = {});
  void Field(const char* key, std::string* value, FieldOptions options = {});
  void Field(const char* key, std::vector<int64_t>* value, FieldOptions options = {});
  void Field(const char* key, std::vector<double>* value, FieldOptions options = {});
  void Field(const char* key, std::vector<std::string>* value, FieldOptions options = {});
  // null: empty; absent: the default stays. Written as null when empty.
  void Field(const char* key, std::optional<int64_t>* value, FieldOptions options = {});
  void Field(const char* key, std::optional<double>* value, FieldOptions options = {});
  void Field(const char* key, std::optional<std::string>* value, FieldOptions options = {});

  template <typename E>
  void Enum(const char* key, E* value, std::initializer_list<std::pair<const char*, E>> names,
            FieldOptions options = {}) {
    std::string text;
    for (const auto& [name, e] : names) {
      if (e == *value) text = name;
    }
    std::vector<std::string> allowed;
    for (const auto& [name, e] : names) allowed.emplace_back(name);
    EnumField(key, &text, allowed, options);
    for (const auto& [name, e] : names) {
      if (text == name) *value = e;
    }
  }

  // A nested mapping; S has void Bind(ConfigBinder&). Absent or null: bound to an empty mapping, so
  // that required keys inside are asked for. An optional section that is absent keeps its default,
  // null empties it.
  template <typename S>
  void Section(const char* key, S* section, FieldOptions options = {}) {
    if (BeginSection(key, options)) {
      section->Bind(*this);
      EndSection();
    }
  }
  template <typename S>
  void Section(const char* key, std::optional<S>* section, FieldOptions options = {}) {
    if (reading() ? HasValue(key) : section->has_value()) {
      if (!section->has_value()) section->emplace();
      Section(key, &**section, options);
    } else {
      if (reading() && Present(key)) section->reset();
      Absent(key, options);
    }
  }
  template <typename S>
  void List(const char* key, std::vector<S>* list, FieldOptions options = {}) {
    const int64_t n = BeginList(key, static_cast<int64_t>(list->size()), options);
    if (n < 0) return;  // absent: keep what is there
    if (reading()) list->assign(static_cast<size_t>(n), S());
    for (int64_t i = 0; i < n; ++i) {
      if (BeginItem(i)) {
        (*list)[static_cast<size_t>(i)].Bind(*this);
        EndSection();
      }
    }
    EndList();
  }

  bool reading() const;
  bool Present(const char* key) const;  // while reading: the key is written in the current mapping
  // Reports a contradiction or a bad value at the place where `key` is written (or at the mapping,
  // if it is not).
  void Error(const char* key, const std::string& code, const std::string& text);

 private:
  friend class ConfigBinderAccess;  // BindConfig and EmitConfig
  ConfigBinder();
  void EnumField(const char* key, std::string* text, const std::vector<std::string>& allowed,
                 FieldOptions options);
  bool BeginSection(const char* key, FieldOptions options);
  void EndSection();
  int64_t BeginList(const char* key, int64_t size, FieldOptions options);
  bool BeginItem(int64_t index);
  void EndList();
  bool HasValue(const char* key) const;  // present and not null
  void Absent(const char* key, FieldOptions options);

  struct State;
  std::unique_ptr<State> state_;
};

class ConfigBinderAccess {
 public:
  static std::unique_ptr<ConfigBinder> Reader(const ConfigDocument& document);
  static std::unique_ptr<ConfigBinder> Writer();
  static Status Finish(ConfigBinder& binder);           // unknown keys and collected errors
  static std::string Text(const ConfigBinder& binder);  // YAML
};

template <typename S>
Status BindConfig(const ConfigDocument& document, S* config) {
  auto binder = ConfigBinderAccess::Reader(document);
  config->Bind(*binder);
  return ConfigBinderAccess::Finish(*binder);
}

template <typename S>
std::string EmitConfig(S config) {
  auto binder = ConfigBinderAccess::Writer();
  config.Bind(*binder);
  return ConfigBinderAccess::Text(*binder);
}

// "7_800_000", "4K": an integer with optional binary suffix -> value; nullopt when it is none or
// does not fit.
std::optional<int64_t> ParseInteger(const std::string& text);

// The candidate with the smallest edit distance to `word`, or "" if none is near.
std::string NearestWord(const std::string& word, const std::vector<std::string>& candidates);

}  // namespace sala
