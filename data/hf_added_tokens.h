// The "added_tokens" of a tokenizer.json: which places of a text they take.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/status.h"
#include "data/hf_json.h"

namespace sala::data {

struct HfAddedToken {
  std::string content;
  int32_t id = -1;
  bool single_word = false;  // not beside a letter, digit or the like
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space after it
  bool normalized = false;   // looked for after normalisation, else before
  bool special = false;
};

// TOK-FORMAT, TOK-UNSUPPORTED.
StatusOr<std::vector<HfAddedToken>> ReadAddedTokens(const HfNode& added_tokens);

// Finds some of the added tokens in a text: leftmost first, of those that start at one place the
// longest.
class HfAddedTokenFinder {
 public:
  struct Span {
    size_t begin;
    size_t end;
    int32_t id;  // -1: what is between tokens
  };

  // `pattern`: how the token reads in the texts that are searched.
  void Add(const std::string& pattern, const HfAddedToken& token);
  bool empty() const { return tokens_.empty(); }

  // The whole text as spans, in order. Bytes that are no UTF-8 count as neither word nor space.
  std::vector<Span> Split(std::string_view text) const;

 private:
  struct Node {
    std::vector<std::pair<char, uint32_t>> next;
    int32_t token = -1;  // in tokens_
  };
  // The token that starts at `at`, and its length; -1: none.
  int32_t Longest(std::string_view text, size_t at, size_t* length) const;

  std::vector<HfAddedToken> tokens_;
  std::vector<Node> nodes_ = {Node{}};
  std::array<bool, 256> starts_{};
};

}  // namespace sala::data
