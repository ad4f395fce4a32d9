#include "data/hf_normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string_view>
#include <utility>

#include "core/check.h"
#include "core/utf8.h"
#include "data/code_points.h"

namespace sala::data {
namespace {

constexpr char kWhatIsRead[] =
    "Sequence, NFC, NFKC, Prepend, Replace, Lowercase, Strip and null are";

// Characters that the `tokenizers` package (0.22.2) leaves as they are where they stand, because
// the Unicode of its normal forms is older than they; utf8proc's is newer. Found by comparing the
// package with Unicode 14 on every code point.
constexpr std::array<std::array<uint32_t, 2>, 42> kLeftAlone = {
    {{0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
     {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
     {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},
     {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
     {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10F46, 0x10F50},
     {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E},
     {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
     {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
     {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
     {0x16FF0, 0x16FF1}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
     {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}}};

// Builds the next form of a text piece by piece.
class Rebuilder {
 public:
  explicit Rebuilder(AlignedText* text) : from_(text) {
    text_.reserve(from_->text.size() + from_->text.size() / 8);
    if (from_->tracked) origin_.reserve(text_.capacity());
  }
  void Copy(size_t begin, size_t end) {
    text_.append(from_->text, begin, end - begin);
    if (from_->tracked)
      origin_.insert(origin_.end(), from_->origin.begin() + static_cast<std::ptrdiff_t>(begin),
                     from_->origin.begin() + static_cast<std::ptrdiff_t>(end));
  }
  // `made` stands for what starts at `begin`.
  void Put(std::string_view made, size_t begin) {
    text_ += made;
    if (from_->tracked) origin_.insert(origin_.end(), made.size(), from_->origin[begin]);
  }
  void Finish() {
    from_->text = std::move(text_);
    from_->origin = std::move(origin_);
  }

 private:
  AlignedText* from_;
  std::string text_;
  std::vector<int64_t> origin_;
};

// One of the two composed forms of Unicode. Text is cut where nothing before can act on what comes
// after, and only cuts that are not normal already are rewritten.
class ComposedForm {
 public:
  static const ComposedForm& Nfc() {
    static const ComposedForm kForm(false);
    return kForm;
  }
  static const ComposedForm& Nfkc() {
    static const ComposedForm kForm(true);
    return kForm;
  }

  explicit ComposedForm(bool compatibility)
      : options_(static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE |
                                                (compatibility ? UTF8PROC_COMPAT : 0))),
        decompose_(static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE |
                                                  (compatibility ? UTF8PROC_COMPAT : 0))),
        kinds_(kCodePoints, 0) {
    std::vector<bool> second(kCodePoints, false);  // composes with a character before it
    std::vector<int32_t> parts(kLongest);
    for (uint32_t c = 0; c < kCodePoints; ++c) {
      for (size_t i = 1, n = Decompose(c, &parts); i < n; ++i)
        second[static_cast<size_t>(parts[i])] = true;
    }
    for (uint32_t c = 0; c < kCodePoints; ++c) {
      const size_t n = Decompose(c, &parts);
      const bool border = n > 0 && utf8proc_get_property(parts[0])->combining_class == 0 &&
                          !second[static_cast<size_t>(parts[0])];
      std::string alone;
      AppendCodePoint(c, &alone);
      const bool changes = !IsSurrogate(c) && (n != 1 || parts[0] != static_cast<int32_t>(c)) &&
                           Compose(alone) != alone;
      kinds_[c] = static_cast<uint8_t>((border ? kBorder : 0) | (changes ? kChanges : 0));
    }
    for (const auto& [begin, last] : kLeftAlone) {
      for (uint32_t c = begin; c <= last; ++c) kinds_[c] = kBorder | kAlone;
    }
  }

  void Apply(AlignedText* text) const {
    const std::string& in = text->text;
    size_t at = FirstOdd(in, 0);
    if (at == in.size()) return;
    Rebuilder out(text);
    size_t begin = 0;  // of what is not given out yet
    while (at < in.size()) {
      const size_t from = std::max(begin, CutBegin(in, at));
      size_t to = at;
      NextCodePoint(in, &to);
      while (to < in.size()) {
        size_t next = to;
        if ((Kind(NextCodePoint(in, &next)) & kBorder) != 0) break;
        to = next;
      }
      out.Copy(begin, from);
      out.Put(Compose(std::string_view(in).substr(from, to - from)), from);
      begin = to;
      at = FirstOdd(in, to);
    }
    out.Copy(begin, in.size());
    out.Finish();
  }

 private:
  static constexpr uint32_t kCodePoints = 0x110000;
  static constexpr size_t kLongest = 32;  // of decompositions; Unicode's longest has 18 characters
  static constexpr uint8_t kBorder = 1;   // nothing before it acts on it
  static constexpr uint8_t kChanges = 2;  // another text even when it stands alone
  static constexpr uint8_t kAlone = 4;    // of kLeftAlone: acts on nothing

  static bool IsSurrogate(uint32_t c) { return c >= 0xD800 && c < 0xE000; }

  size_t Decompose(uint32_t c, std::vector<int32_t>* parts) const {
    int last_class = 0;
    const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), parts->data(),
                                               static_cast<utf8proc_ssize_t>(parts->size()),
                                               decompose_, &last_class);
    return count < 0 ? 0 : std::min(static_cast<size_t>(count), parts->size());
  }

  uint8_t Kind(uint32_t c) const { return kinds_[c]; }

  // The next character that is no border, or changes; the end where there is none.
  size_t FirstOdd(const std::string& text, size_t at) const {
    while (at < text.size()) {
      if (static_cast<uint8_t>(text[at]) < 0x80) {
        ++at;
        continue;
      }
      size_t next = at;
      if ((Kind(NextCodePoint(text, &next)) | kAlone) != (kBorder | kAlone)) return at;
      at = next;
    }
    return at;
  }

  // Where the cut starts that the character at `at` is in: there if it is a border, else at the
  // character before it.
  size_t CutBegin(const std::string& text, size_t at) const {
    size_t after = at;
    if (at == 0 || (Kind(NextCodePoint(text, &after)) & kBorder) != 0) return at;
    size_t before = at - 1;
    while ((static_cast<uint8_t>(text[before]) & 0xC0) == 0x80) --before;
    after = before;
    return (Kind(NextCodePoint(text, &after)) & kAlone) != 0 ? at : before;
  }

  // utf8proc_map, whose own sort takes the square of the length of a run of marks.
  std::string Compose(std::string_view text) const {
    std::vector<int32_t> points;
    std::vector<int32_t> parts(kLongest);
    for (size_t at = 0; at < text.size();) {
      const size_t count = Decompose(NextCodePoint(text, &at), &parts);
      points.insert(points.end(), parts.begin(),
                    parts.begin() + static_cast<std::ptrdiff_t>(count));
    }
    SortMarks(&points);
    const utf8proc_ssize_t size = utf8proc_normalize_utf32(
        points.data(), static_cast<utf8proc_ssize_t>(points.size()), options_);
    SALA_CHECK(size >= 0) << utf8proc_errmsg(size);
    std::string composed;
    for (size_t i = 0; i < static_cast<size_t>(size); ++i)
      AppendCodePoint(static_cast<uint32_t>(points[i]), &composed);
    return composed;
  }

  // The canonical order: marks between two characters of class 0 by their class.
  static void SortMarks(std::vector<int32_t>* points) {
    const auto class_of = [](int32_t c) { return utf8proc_get_property(c)->combining_class; };
    const auto starts = [&](int32_t c) { return class_of(c) == 0; };
    for (auto begin = points->begin(); begin != points->end();) {
      const auto end = std::find_if(begin, points->end(), starts);
      std::stable_sort(begin, end, [&](int32_t a, int32_t b) { return class_of(a) < class_of(b); });
      begin = end == points->end() ? end : end + 1;
    }
  }

  utf8proc_option_t options_;
  utf8proc_option_t decompose_;
  std::vector<uint8_t> kinds_;
};

void Lowercase(AlignedText* text) {
  Rebuilder out(text);
  const std::string& in = text->text;
  std::string lower;
  for (size_t at = 0; at < in.size();) {
    const size_t begin = at;
    const uint32_t c = NextCodePoint(in, &at);
    lower.clear();
    if (c == 0x130) {  // the one character whose lower case is two characters
      lower = "i\xcc\x87";
    } else {
      AppendCodePoint(static_cast<uint32_t>(utf8proc_tolower(static_cast<int32_t>(c))), &lower);
    }
    out.Put(lower, begin);
  }
  out.Finish();
}

void Strip(bool left, bool right, AlignedText* text) {
  const std::string& in = text->text;
  size_t begin = in.size(), end = 0;  // of what is no white space
  for (size_t at = 0; at < in.size();) {
    const size_t here = at;
    if (IsWhiteSpace(NextCodePoint(in, &at))) continue;
    begin = std::min(begin, here);
    end = at;
  }
  if (!left) begin = 0;
  if (!right || begin > end) end = in.size();
  if (begin > 0) text->at_start = false;
  Rebuilder out(text);
  out.Copy(begin, end);
  out.Finish();
}

}  // namespace

void PrependText(const std::string& prefix, AlignedText* text) {
  if (text->text.empty()) return;
  text->text.insert(0, prefix);
  if (text->tracked)
    text->origin.insert(text->origin.begin(), prefix.size(), int64_t{text->origin[0]});
}

void ReplaceText(const std::string& pattern, const std::string& content, AlignedText* text) {
  size_t hit = text->text.find(pattern);
  if (hit == std::string::npos) return;
  // What is put in stands for the last character of what goes.
  const bool one_character = Utf8SequenceLength(pattern, 0) == pattern.size();
  if (hit == 0 && (content.empty() || !one_character)) text->at_start = false;
  Rebuilder out(text);
  size_t begin = 0;
  for (; hit != std::string::npos; hit = text->text.find(pattern, begin)) {
    out.Copy(begin, hit);
    out.Put(content, hit);
    begin = hit + pattern.size();
  }
  out.Copy(begin, text->text.size());
  out.Finish();
}

void RepairUtf8(AlignedText* text) {
  Rebuilder out(text);
  size_t good = 0;
  for (size_t at = 0; at < text->text.size();) {
    const size_t length = Utf8SequenceLength(text->text, at);
    if (length == 0) {
      out.Copy(good, at);
      out.Put("\xef\xbf\xbd", at);
      good = at + 1;
    }
    at += std::max(length, size_t{1});
  }
  out.Copy(good, text->text.size());
  out.Finish();
}

StatusOr<HfNormalizer> HfNormalizer::Read(const HfNode& normalizer) {
  HfNormalizer made;
  if (!normalizer.is_null()) SALA_RETURN_IF_ERROR(made.Add(normalizer));
  return made;
}

void HfNormalizer::Apply(AlignedText* text) const {
  for (const Step& step : steps_) step(text);
}

Status HfNormalizer::Add(const HfNode& node) {
  SALA_ASSIGN_OR_RETURN(const std::string type, node.Type());
  if (type == "Sequence") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "normalizers"}));
    SALA_ASSIGN_OR_RETURN(const auto list, node["normalizers"].List());
    for (const HfNode& each : list) SALA_RETURN_IF_ERROR(Add(each));
  } else if (type == "NFC" || type == "NFKC") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type"}));
    if (type == "NFC") {
      steps_.emplace_back([](AlignedText* text) { ComposedForm::Nfc().Apply(text); });
    } else {
      steps_.emplace_back([](AlignedText* text) { ComposedForm::Nfkc().Apply(text); });
    }
  } else if (type == "Prepend") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "prepend"}));
    SALA_ASSIGN_OR_RETURN(const std::string prefix, node["prepend"].Text());
    if (prefix.empty()) return node["prepend"].Unsupported("texts that are not empty are");
    steps_.emplace_back([prefix](AlignedText* text) { PrependText(prefix, text); });
  } else if (type == "Replace") {
    SALA_ASSIGN_OR_RETURN(const LiteralReplace replace, ReadLiteralReplace(node));
    steps_.emplace_back(
        [replace](AlignedText* text) { ReplaceText(replace.pattern, replace.content, text); });
  } else if (type == "Lowercase") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type"}));
    steps_.emplace_back(&Lowercase);
  } else if (type == "Strip") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "strip_left", "strip_right"}));
    SALA_ASSIGN_OR_RETURN(const bool left, node["strip_left"].Flag());
    SALA_ASSIGN_OR_RETURN(const bool right, node["strip_right"].Flag());
    steps_.emplace_back([left, right](AlignedText* text) { Strip(left, right, text); });
  } else {
    return node["type"].Unsupported(kWhatIsRead);
  }
  return OkStatus();
}

}  // namespace sala::data
