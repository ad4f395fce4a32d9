#include "data/hf_added_tokens.h"

#include <algorithm>
#include <set>

#include "core/file.h"
#include "core/utf8.h"
#include "data/bpe.h"
#include "data/code_points.h"
#include "data/hf_regex.h"

namespace sala::data {
namespace {

// As NextCodePoint, for text that may be no UTF-8: such a byte is U+FFFD.
uint32_t NextOfAnyText(std::string_view text, size_t* at) {
  if (Utf8SequenceLength(text, *at) > 0) return NextCodePoint(text, at);
  ++*at;
  return 0xFFFD;
}

// The start of the character that ends before `at`, which is not 0.
size_t CharacterBefore(std::string_view text, size_t at) {
  for (size_t length = 2; length <= std::min(at, size_t{4}); ++length) {
    if (Utf8SequenceLength(text, at - length) == length) return at - length;
  }
  return at - 1;
}

// Whether a character is part of words: Unicode's \w.
bool IsWord(uint32_t c) {
  static const HfRegex kWord =
      HfRegex::MustCompile(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])");
  std::string character;
  AppendCodePoint(c, &character);
  size_t begin = 0, end = 0;
  return kWord.Find(character, 0, &begin, &end);
}

bool IsWordBefore(std::string_view text, size_t at) {
  if (at == 0) return false;
  size_t before = CharacterBefore(text, at);
  return IsWord(NextOfAnyText(text, &before));
}

bool IsWordAt(std::string_view text, size_t at) {
  return at < text.size() && IsWord(NextOfAnyText(text, &at));
}

// The start of the space that ends at `at`, `from` at the earliest.
size_t SpaceBegin(std::string_view text, size_t from, size_t at) {
  while (at > from) {
    const size_t before = CharacterBefore(text, at);
    size_t next = before;
    if (!IsWhiteSpace(NextOfAnyText(text, &next))) break;
    at = before;
  }
  return at;
}

size_t SpaceEnd(std::string_view text, size_t at) {
  for (size_t next = at; next < text.size(); at = next) {
    if (!IsWhiteSpace(NextOfAnyText(text, &next))) break;
  }
  return at;
}

}  // namespace

StatusOr<std::vector<HfAddedToken>> ReadAddedTokens(const HfNode& added_tokens) {
  std::vector<HfAddedToken> tokens;
  if (added_tokens.is_null()) return tokens;
  SALA_ASSIGN_OR_RETURN(const auto list, added_tokens.List());
  std::set<std::string> contents;
  std::set<int32_t> ids;
  for (const HfNode& node : list) {
    SALA_RETURN_IF_ERROR(node.OnlyKeys(
        {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}));
    HfAddedToken token;
    SALA_ASSIGN_OR_RETURN(const int64_t id, node["id"].Number(kMaxVocabulary));
    token.id = static_cast<int32_t>(id);
    SALA_ASSIGN_OR_RETURN(token.content, node["content"].Text());
    SALA_ASSIGN_OR_RETURN(token.single_word, node["single_word"].Flag());
    SALA_ASSIGN_OR_RETURN(token.lstrip, node["lstrip"].Flag());
    SALA_ASSIGN_OR_RETURN(token.rstrip, node["rstrip"].Flag());
    SALA_ASSIGN_OR_RETURN(token.normalized, node["normalized"].Flag());
    SALA_ASSIGN_OR_RETURN(token.special, node["special"].Flag());
    if (token.content.empty()) return node["content"].Malformed("a text that is not empty");
    if (!contents.insert(token.content).second)
      return node["content"].Malformed("another text than the added tokens before it");
    if (!ids.insert(token.id).second)
      return node["id"].Malformed("another id than the added tokens before it");
    tokens.push_back(std::move(token));
  }
  return tokens;
}

void HfAddedTokenFinder::Add(const std::string& pattern, const HfAddedToken& token) {
  if (pattern.empty()) return;
  starts_[static_cast<uint8_t>(pattern[0])] = true;
  size_t at = 0;
  for (const char c : pattern) {
    const auto known = std::find_if(nodes_[at].next.begin(), nodes_[at].next.end(),
                                    [c](const auto& next) { return next.first == c; });
    if (known != nodes_[at].next.end()) {
      at = known->second;
      continue;
    }
    const auto made = static_cast<uint32_t>(nodes_.size());
    nodes_[at].next.emplace_back(c, made);
    nodes_.emplace_back();
    at = made;
  }
  nodes_[at].token = static_cast<int32_t>(tokens_.size());
  tokens_.push_back(token);
}

int32_t HfAddedTokenFinder::Longest(std::string_view text, size_t at, size_t* length) const {
  int32_t best = -1;
  size_t node = 0;
  for (size_t i = at; i < text.size(); ++i) {
    const auto& next = nodes_[node].next;
    const auto found = std::find_if(next.begin(), next.end(),
                                    [&](const auto& edge) { return edge.first == text[i]; });
    if (found == next.end()) break;
    node = found->second;
    if (nodes_[node].token < 0) continue;
    best = nodes_[node].token;
    *length = i + 1 - at;
  }
  return best;
}

std::vector<HfAddedTokenFinder::Span> HfAddedTokenFinder::Split(std::string_view text) const {
  std::vector<Span> spans;
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    if (!starts_[static_cast<uint8_t>(text[at])]) {
      ++at;
      continue;
    }
    size_t length = 0;
    const int32_t found = Longest(text, at, &length);
    if (found < 0) {
      ++at;
      continue;
    }
    const HfAddedToken& token = tokens_[static_cast<size_t>(found)];
    size_t begin = at, end = at + length;
    at = end;
    if (token.single_word && (IsWordBefore(text, begin) || IsWordAt(text, end))) continue;
    // Space that the token before took already stays with that one.
    if (token.lstrip) begin = SpaceBegin(text, done, begin);
    if (token.rstrip) end = SpaceEnd(text, end);
    if (done < begin) spans.push_back({done, begin, -1});
    spans.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) spans.push_back({done, text.size(), -1});
  return spans;
}

}  // namespace sala::data
