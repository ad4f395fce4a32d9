// The regular expressions of a tokenizer.json, which are written for Oniguruma (Ruby syntax), by
// PCRE2.
//
// The two agree where a pattern uses: literal characters, classes without nesting, groups (?:)
// (?i:) (?>) (?=) (?!) (?<=) (?<!), alternatives, quantifiers, ^ $ . and the escapes \s \S \d \D
// \p{...} \P{...} \r \n \t \f \xHH \uHHHH and escaped punctuation. Everything else is refused:
// it means another thing in one of them (\w, \h, \b, [a&&b], {1,2}+ ...), and ids that are nearly
// right are wrong. \s is the property White_Space, as in Oniguruma; PCRE2's own \s has U+180E too.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "core/status.h"
#include "data/hf_json.h"

namespace sala::data {

class HfRegex {
 public:
  // `place`: the value that holds the pattern, for errors. TOK-UNSUPPORTED, TOK-FORMAT.
  static StatusOr<HfRegex> Compile(const std::string& pattern, const HfNode& place);
  // For patterns of ours, in PCRE2's own syntax.
  static HfRegex MustCompile(const std::string& pattern);

  // The first match at or after `from`. `text` is well-formed UTF-8 and `from` a character border.
  // Safe to call from several threads. A pattern that needs more than 512 MiB of stack, or more
  // steps than PCRE2 counts, throws std::runtime_error.
  bool Find(std::string_view text, size_t from, size_t* begin, size_t* end) const;

 private:
  struct Code;
  explicit HfRegex(std::shared_ptr<const Code> code) : code_(std::move(code)) {}
  std::shared_ptr<const Code> code_;
};

}  // namespace sala::data
