// Numbers and words of configuration files.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>

#include "core/config.h"
#include "core/config_node.h"
#include "core/file.h"

namespace sala {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// Takes underscores out; nullopt when one is not between two digits.
std::optional<std::string> WithoutUnderscores(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      out += text[i];
    } else if (i == 0 || i + 1 == text.size() || !IsDigit(text[i - 1]) || !IsDigit(text[i + 1])) {
      return std::nullopt;
    }
  }
  return out;
}

// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours
// cost one each.
size_t EditDistance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> cost(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) cost[i][0] = i;
  for (size_t j = 0; j <= b.size(); ++j) cost[0][j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substitute = cost[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, substitute});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
      }
    }
  }
  return cost[a.size()][b.size()];
}

bool OneContainsTheOther(const std::string& a, const std::string& b) {
  constexpr size_t kShortest = 3;  // "a" is part of too many words
  return std::min(a.size(), b.size()) >= kShortest &&
         (a.find(b) != std::string::npos || b.find(a) != std::string::npos);
}

}  // namespace

std::optional<int64_t> ParseInteger(const std::string& text) {
  const auto plain = WithoutUnderscores(text);
  if (!plain.has_value() || plain->empty()) return std::nullopt;
  std::string_view digits = *plain;
  int64_t unit = 1;
  constexpr std::string_view kSuffixes = "KMGT";
  const size_t power = kSuffixes.find(digits.back());
  if (power != std::string_view::npos) {
    unit = int64_t{1} << (10 * (power + 1));
    digits.remove_suffix(1);
  }
  if (digits.size() > 1 && digits[0] == '+' && IsDigit(digits[1])) digits.remove_prefix(1);
  int64_t value = 0;
  const auto [end, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), value, 10);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  if (__builtin_mul_overflow(value, unit, &value)) return std::nullopt;
  return value;
}

std::optional<double> ParseDouble(const std::string& text) {
  if (const auto integer = ParseInteger(text)) {
    // "-0" is an integer too, but only the path below keeps its sign.
    if (*integer != 0) return static_cast<double>(*integer);
  }
  const auto plain = WithoutUnderscores(text);
  if (!plain.has_value() || plain->empty()) return std::nullopt;
  std::string_view digits = *plain;
  if (digits.size() > 1 && digits[0] == '+' && digits[1] != '-') digits.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || end != digits.data() + digits.size() || !std::isfinite(value))
    return std::nullopt;
  return value;
}

std::string NearestWord(const std::string& word, const std::vector<std::string>& candidates) {
  std::string best;
  size_t best_distance = 0;
  for (const std::string& candidate : candidates) {
    const size_t distance = EditDistance(word, candidate);
    const bool near =
        distance <= std::max<size_t>(1, word.size() / 3) || OneContainsTheOther(word, candidate);
    if (near && (best.empty() || distance < best_distance)) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

std::string SuggestionText(const std::string& word, const std::vector<std::string>& candidates) {
  const std::string nearest = NearestWord(word, candidates);
  if (!nearest.empty()) return "; did you mean `" + nearest + "`?";
  std::string text;
  for (const std::string& candidate : candidates) text += (text.empty() ? "" : ", ") + candidate;
  return text.empty() ? "; no key is valid here" : "; valid are: " + text;
}

std::string OriginText(const std::string& path, const ConfigOrigin& origin) {
  if (!origin.set.empty()) return "`" + Printable(origin.set) + "`";
  return path + ":" + std::to_string(origin.line) + ":" + std::to_string(origin.column);
}

std::string JoinPath(const std::string& path, const std::string& key) {
  return path.empty() ? key : path + "." + key;
}

std::string FoundText(const ConfigDocument::Node& node) {
  switch (node.kind) {
    case ConfigDocument::Node::Kind::kNull:
      return "nothing";
    case ConfigDocument::Node::Kind::kScalar:
      return (node.quoted ? "quoted text `" : "`") + Printable(node.scalar) + "`";
    case ConfigDocument::Node::Kind::kSequence:
      return "a list";
    case ConfigDocument::Node::Kind::kMap:
      return "a mapping";
  }
  return "";
}

}  // namespace sala
