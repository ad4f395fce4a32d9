#include "data/hf_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/file.h"

namespace sala::data {
namespace {

constexpr size_t kSmallStack = size_t{32} << 10;
constexpr size_t kLargestStack = size_t{512} << 20;

// What a thread needs for matching; made once for each thread.
class MatchSpace {
 public:
  MatchSpace()
      : data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        stack_(pcre2_jit_stack_create(kSmallStack, kLargestStack, nullptr)) {
    SALA_CHECK(data_ != nullptr && context_ != nullptr && stack_ != nullptr);
    pcre2_set_match_limit(context_, UINT32_MAX);
    pcre2_jit_stack_assign(context_, nullptr, stack_);
  }
  MatchSpace(const MatchSpace&) = delete;
  MatchSpace& operator=(const MatchSpace&) = delete;
  ~MatchSpace() {
    pcre2_jit_stack_free(stack_);
    pcre2_match_context_free(context_);
    pcre2_match_data_free(data_);
  }
  pcre2_match_data* data() { return data_; }
  pcre2_match_context* context() { return context_; }

 private:
  pcre2_match_data* data_;
  pcre2_match_context* context_;
  pcre2_jit_stack* stack_;
};

// Rewrites a pattern for PCRE2, or says what in it is not the same there.
class Rewriter {
 public:
  explicit Rewriter(const std::string& pattern) : in_(pattern) {}

  bool Run() {
    while (at_ < in_.size() && problem_.empty()) {
      if (in_[at_] == '\\') {
        Escape();
      } else if (in_class_) {
        InClass();
      } else {
        Outside();
      }
    }
    return problem_.empty();
  }
  const std::string& out() const { return out_; }
  const std::string& problem() const { return problem_; }

 private:
  bool Starts(std::string_view text) const { return in_.compare(at_, text.size(), text) == 0; }
  void Copy(size_t count) {
    out_.append(in_, at_, count);
    at_ += count;
  }
  void Refuse(size_t count) { problem_ = in_.substr(at_, count); }

  bool ignores_case() const { return !groups_.empty() && groups_.back(); }
  // Without case Oniguruma also takes one character for several (U+00DF for ss, U+FB01 for fi) and
  // several for one, PCRE2 never does. Groups that only bracket do not part what stands together.
  bool MayFoldToSeveral() {
    const char c = in_[at_];
    if (static_cast<uint8_t>(c) >= 0x80) return true;
    const char small = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    const std::string pair = {last_, small};
    if (c != '(' && c != ')') last_ = small;
    return pair == "ss" || pair == "st" || pair == "ff" || pair == "fi" || pair == "fl";
  }

  void InClass() {
    if (ignores_case() && static_cast<uint8_t>(in_[at_]) >= 0x80) return Refuse(1);
    if (Starts("&&")) return Refuse(2);
    if (in_[at_] == '[') return Refuse(2);
    if (in_[at_] == ']') in_class_ = false;
    Copy(1);
  }

  void Outside() {
    if (in_[at_] == '[') {
      last_ = 0;
      in_class_ = true;
      Copy(Starts("[^") ? 2 : 1);
      if (at_ < in_.size() && in_[at_] == ']')
        Refuse(1);  // a literal in one, an empty class in
                    // the other
      return;
    }
    if (Starts("(?") && !AllowedGroup()) return Refuse(3);
    if (Starts("(*")) return Refuse(2);
    if (in_[at_] == '}' && at_ + 1 < in_.size() && in_[at_ + 1] == '+') return Refuse(2);
    if (Starts("{,")) return Refuse(2);
    if (ignores_case() && MayFoldToSeveral()) return Refuse(1);
    if (in_[at_] == '(') {
      groups_.push_back(ignores_case() || Starts("(?i:"));
      if (Starts("(?:")) return Copy(3);
      last_ = 0;
      return Copy(Starts("(?i:") ? 4 : 1);
    }
    if (in_[at_] == ')' && !groups_.empty()) groups_.pop_back();
    Copy(1);
  }

  bool AllowedGroup() const {
    for (const char* group : {"(?:", "(?i:", "(?>", "(?=", "(?!", "(?<=", "(?<!"}) {
      if (Starts(group)) return true;
    }
    return false;
  }

  void Escape() {
    last_ = 0;
    if (at_ + 1 == in_.size()) return Refuse(1);
    const char c = in_[at_ + 1];
    if (ignores_case() && (c == 'u' || c == 'x')) return Refuse(2);
    if (c == 's' || c == 'S') {
      out_ += c == 's' ? "\\p{White_Space}" : "\\P{White_Space}";
      at_ += 2;
    } else if (c == 'p' || c == 'P') {
      Property();
    } else if (c == 'u') {
      if (HexDigits(at_ + 2) < 4) return Refuse(2);
      out_ += "\\x{" + in_.substr(at_ + 2, 4) + "}";
      at_ += 6;
    } else if (c == 'x') {
      if (HexDigits(at_ + 2) < 2) return Refuse(2);
      // From 80 on a byte there, a character here.
      if (in_[at_ + 2] >= '8') return Refuse(4);
      Copy(4);
    } else if (std::string_view("dDrntf").find(c) != std::string_view::npos) {
      Copy(2);
    } else if (static_cast<uint8_t>(c) < 0x80 &&
               std::string_view("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
                       .find(c) == std::string_view::npos) {
      Copy(2);
    } else {
      Refuse(2);
    }
  }

  // A general category stays; any other name is a script, which PCRE2 would take for the wider
  // Script_Extensions.
  void Property() {
    const size_t close = in_.find('}', at_);
    if (at_ + 2 >= in_.size() || in_[at_ + 2] != '{' || close == std::string::npos)
      return Refuse(2);
    const std::string name = in_.substr(at_ + 3, close - at_ - 3);
    if (name.empty() || name.find_first_not_of("abcdefghijklmnopqrstuvwxyz"
                                               "ABCDEFGHIJKLMNOPQRSTUVWXYZ_") != std::string::npos)
      return Refuse(close + 1 - at_);
    out_ += in_.substr(at_, 3) + (name.size() <= 2 ? "" : "sc:") + name + "}";
    at_ = close + 1;
  }

  size_t HexDigits(size_t at) const {
    size_t count = 0;
    while (at + count < in_.size() && count < 4 &&
           std::string_view("0123456789abcdefABCDEF").find(in_[at + count]) !=
               std::string_view::npos)
      ++count;
    return count;
  }

  const std::string& in_;
  std::string out_;
  std::string problem_;
  size_t at_ = 0;
  bool in_class_ = false;
  std::vector<bool> groups_;  // of the open groups: whether case does not count
  char last_ = 0;             // small, of what stands in such groups
};

std::string Pcre2Message(int error) {
  PCRE2_UCHAR8 text[256];
  if (pcre2_get_error_message(error, text, sizeof text) < 0)
    return "error " + std::to_string(error);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

struct HfRegex::Code {
  explicit Code(pcre2_code* made)
      : code(made), jit(pcre2_jit_compile(made, PCRE2_JIT_COMPLETE) == 0) {}
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() { pcre2_code_free(code); }

  // nullptr where the pattern is none; then *error says why.
  static std::shared_ptr<const Code> Make(const std::string& pattern, std::string* error) {
    pcre2_compile_context* context = pcre2_compile_context_create(nullptr);
    SALA_CHECK(context != nullptr);
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    int number = 0;
    PCRE2_SIZE offset = 0;
    // In Ruby's syntax ^ and $ are borders of lines.
    pcre2_code* code =
        pcre2_compile(reinterpret_cast<PCRE2_SPTR8>(pattern.data()), pattern.size(),
                      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &number, &offset, context);
    pcre2_compile_context_free(context);
    if (code != nullptr) return std::make_shared<const Code>(code);
    *error = Pcre2Message(number);
    return nullptr;
  }

  pcre2_code* code;
  bool jit;
};

StatusOr<HfRegex> HfRegex::Compile(const std::string& pattern, const HfNode& place) {
  Rewriter rewriter(pattern);
  if (!rewriter.Run()) {
    return place.Unsupported("'" + Printable(rewriter.problem()) +
                             "' in it means another thing in other libraries");
  }
  std::string error;
  auto code = Code::Make(rewriter.out(), &error);
  if (code == nullptr) return place.Unsupported("as a pattern: " + error);
  return HfRegex(std::move(code));
}

HfRegex HfRegex::MustCompile(const std::string& pattern) {
  std::string error;
  auto code = Code::Make(pattern, &error);
  SALA_CHECK(code != nullptr) << pattern << ": " << error;
  return HfRegex(std::move(code));
}

bool HfRegex::Find(std::string_view text, size_t from, size_t* begin, size_t* end) const {
  thread_local MatchSpace space;
  const auto subject = reinterpret_cast<PCRE2_SPTR8>(text.data());
  const int result = code_->jit ? pcre2_jit_match(code_->code, subject, text.size(), from, 0,
                                                  space.data(), space.context())
                                : pcre2_match(code_->code, subject, text.size(), from,
                                              PCRE2_NO_UTF_CHECK, space.data(), space.context());
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0)
    throw std::runtime_error("a tokenizer's regular expression failed on a text of " +
                             std::to_string(text.size()) + " bytes: " + Pcre2Message(result));
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer(space.data());
  *begin = span[0];
  *end = span[1];
  return true;
}

}  // namespace sala::data
