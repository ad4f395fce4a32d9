#include "data/hf_pretokenizer.h"

#include <utf8proc.h>

#include <map>
#include <string>
#include <utility>

#include "core/utf8.h"
#include "data/code_points.h"
#include "data/hf_regex.h"

namespace sala::data {
namespace {

constexpr char kWhatIsRead[] = "Sequence, Split, ByteLevel, Digits, Metaspace and null are";

enum class Behavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

TextPiece Sub(const TextPiece& piece, size_t begin, size_t end) {
  return {piece.text.substr(begin, end - begin),
          piece.origin == nullptr ? nullptr : piece.origin + begin, piece.at_start && begin == 0};
}

// Takes the spans of a text in order, each a match or what is between matches, joins them as the
// behavior says and gives what is not empty to the sink.
class Joiner {
 public:
  Joiner(const TextPiece& piece, Behavior behavior, const HfPretokenizer::Sink& sink)
      : piece_(piece), behavior_(behavior), sink_(sink) {}

  void Add(size_t begin, size_t end, bool match) {
    switch (behavior_) {
      case Behavior::kIsolated:
        return Give(begin, end);
      case Behavior::kRemoved:
        return match ? void() : Give(begin, end);
      case Behavior::kContiguous:
        return AddTo(begin, end, match, match == previous_match_);
      case Behavior::kMergedWithPrevious:
        return AddTo(begin, end, match, match && !previous_match_);
      case Behavior::kMergedWithNext:
        return AddTo(begin, end, match, !match && previous_match_);
    }
  }
  void Finish() {
    if (pending_) Give(begin_, end_);
  }

 private:
  void AddTo(size_t begin, size_t end, bool match, bool join) {
    if (!(pending_ && join)) {
      Finish();
      begin_ = begin;
    }
    pending_ = true;
    end_ = end;
    previous_match_ = match;
  }
  void Give(size_t begin, size_t end) const {
    if (end > begin) sink_(Sub(piece_, begin, end));
  }

  const TextPiece& piece_;
  Behavior behavior_;
  const HfPretokenizer::Sink& sink_;
  bool pending_ = false;
  bool previous_match_ = false;
  size_t begin_ = 0, end_ = 0;
};

// `find(from, &begin, &end)` gives the next match; `invert` swaps matches and what is between.
template <typename Find>
void SplitBy(const TextPiece& piece, Behavior behavior, bool invert, const Find& find,
             const HfPretokenizer::Sink& sink) {
  Joiner joiner(piece, behavior, sink);
  size_t done = 0;  // where the last match ended
  size_t from = 0;
  bool matched = false;
  size_t begin = 0, end = 0;
  while (from <= piece.text.size() && find(from, &begin, &end)) {
    // An empty match right behind the last one is none.
    if (begin == end && matched && begin == done) {
      if (begin == piece.text.size()) break;
      from = begin;
      NextCodePoint(piece.text, &from);
      continue;
    }
    if (done != begin) joiner.Add(done, begin, invert);
    joiner.Add(begin, end, !invert);
    matched = true;
    done = from = end;
  }
  if (done != piece.text.size()) joiner.Add(done, piece.text.size(), invert);
  joiner.Finish();
}

template <typename Is>
auto FindCharacter(std::string_view text, const Is& is) {
  return [text, is](size_t from, size_t* begin, size_t* end) {
    for (size_t at = from; at < text.size();) {
      *begin = at;
      const bool hit = is(NextCodePoint(text, &at));
      *end = at;
      if (hit) return true;
    }
    return false;
  };
}

bool IsNumeric(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO;
}

// The piece as a text of its own that can be changed.
AlignedText Owned(const TextPiece& piece) {
  AlignedText text{.text = std::string(piece.text),
                   .tracked = piece.origin != nullptr,
                   .at_start = piece.at_start,
                   .origin = {}};
  if (text.tracked) text.origin.assign(piece.origin, piece.origin + piece.text.size());
  return text;
}

TextPiece View(const AlignedText& text) {
  return {text.text, text.tracked ? text.origin.data() : nullptr, text.at_start};
}

constexpr char kByteLevelPattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|)"
    R"(\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+)";

}  // namespace

StatusOr<HfPretokenizer> HfPretokenizer::Read(const HfNode& pre_tokenizer) {
  HfPretokenizer made;
  if (!pre_tokenizer.is_null()) SALA_RETURN_IF_ERROR(made.Add(pre_tokenizer));
  return made;
}

Status HfPretokenizer::Add(const HfNode& node) {
  SALA_ASSIGN_OR_RETURN(const std::string type, node.Type());
  if (byte_level_) return node.Unsupported("ByteLevel is the last of a Sequence");
  if (type == "Sequence") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "pretokenizers"}));
    SALA_ASSIGN_OR_RETURN(const auto list, node["pretokenizers"].List());
    for (const HfNode& each : list) SALA_RETURN_IF_ERROR(Add(each));
    return OkStatus();
  }
  if (type == "Split") return AddSplit(node);
  if (type == "ByteLevel") return AddByteLevel(node);
  if (type == "Metaspace") return AddMetaspace(node);
  if (type == "Digits") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "individual_digits"}));
    SALA_ASSIGN_OR_RETURN(const bool individual, node["individual_digits"].Flag(false));
    const Behavior behavior = individual ? Behavior::kIsolated : Behavior::kContiguous;
    stages_.emplace_back([behavior](const TextPiece& piece, const Sink& sink) {
      SplitBy(piece, behavior, false, FindCharacter(piece.text, IsNumeric), sink);
    });
    return OkStatus();
  }
  return node["type"].Unsupported(kWhatIsRead);
}

Status HfPretokenizer::AddSplit(const HfNode& node) {
  SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "pattern", "behavior", "invert"}));
  static const std::map<std::string, Behavior> kBehaviors = {
      {"Isolated", Behavior::kIsolated},
      {"Removed", Behavior::kRemoved},
      {"MergedWithPrevious", Behavior::kMergedWithPrevious},
      {"MergedWithNext", Behavior::kMergedWithNext},
      {"Contiguous", Behavior::kContiguous}};
  SALA_ASSIGN_OR_RETURN(const std::string name, node["behavior"].Text());
  const auto known = kBehaviors.find(name);
  if (known == kBehaviors.end())
    return node["behavior"].Unsupported(
        "Isolated, Removed, MergedWithPrevious, MergedWithNext and Contiguous are");
  const Behavior behavior = known->second;
  SALA_ASSIGN_OR_RETURN(const bool invert, node["invert"].Flag());
  const HfNode pattern = node["pattern"];
  SALA_RETURN_IF_ERROR(pattern.OnlyKeys({"Regex", "String"}));
  if (pattern["Regex"].is_null() == pattern["String"].is_null())
    return pattern.Malformed("either a Regex or a String");
  if (!pattern["String"].is_null()) {
    SALA_ASSIGN_OR_RETURN(const std::string literal, pattern["String"].Text());
    if (literal.empty()) return pattern.Unsupported("texts that are not empty are");
    stages_.emplace_back([=](const TextPiece& piece, const Sink& sink) {
      const auto find = [&](size_t from, size_t* begin, size_t* end) {
        *begin = piece.text.find(literal, from);
        *end = *begin + literal.size();
        return *begin != std::string_view::npos;
      };
      SplitBy(piece, behavior, invert, find, sink);
    });
    return OkStatus();
  }
  SALA_ASSIGN_OR_RETURN(const std::string text, pattern["Regex"].Text());
  SALA_ASSIGN_OR_RETURN(const HfRegex regex, HfRegex::Compile(text, pattern["Regex"]));
  stages_.emplace_back([=](const TextPiece& piece, const Sink& sink) {
    const auto find = [&](size_t from, size_t* begin, size_t* end) {
      return regex.Find(piece.text, from, begin, end);
    };
    SplitBy(piece, behavior, invert, find, sink);
  });
  return OkStatus();
}

Status HfPretokenizer::AddByteLevel(const HfNode& node) {
  SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "add_prefix_space", "trim_offsets", "use_regex"}));
  SALA_ASSIGN_OR_RETURN(const bool prefix, node["add_prefix_space"].Flag());
  SALA_ASSIGN_OR_RETURN(const bool use_regex, node["use_regex"].Flag(true));
  byte_level_ = true;
  if (prefix) {
    stages_.emplace_back([](const TextPiece& piece, const Sink& sink) {
      if (piece.text[0] == ' ') return sink(piece);
      AlignedText text = Owned(piece);
      PrependText(" ", &text);
      sink(View(text));
    });
  }
  if (!use_regex) return OkStatus();
  const HfRegex regex = HfRegex::MustCompile(kByteLevelPattern);
  stages_.emplace_back([regex](const TextPiece& piece, const Sink& sink) {
    const auto find = [&](size_t from, size_t* begin, size_t* end) {
      return regex.Find(piece.text, from, begin, end);
    };
    SplitBy(piece, Behavior::kIsolated, false, find, sink);
  });
  return OkStatus();
}

Status HfPretokenizer::AddMetaspace(const HfNode& node) {
  SALA_RETURN_IF_ERROR(node.OnlyKeys(
      {"type", "replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"}));
  SALA_ASSIGN_OR_RETURN(const std::string mark, node["replacement"].Text());
  if (mark.empty() || Utf8SequenceLength(mark, 0) != mark.size())
    return node["replacement"].Malformed("one character");
  std::string scheme = "always";
  if (!node["prepend_scheme"].is_null()) {
    SALA_ASSIGN_OR_RETURN(scheme, node["prepend_scheme"].Text());
  } else {
    SALA_ASSIGN_OR_RETURN(const bool prefix, node["add_prefix_space"].Flag(true));
    if (!prefix) scheme = "never";
  }
  if (scheme != "always" && scheme != "first" && scheme != "never")
    return node["prepend_scheme"].Unsupported("always, first and never are");
  SALA_ASSIGN_OR_RETURN(const bool split, node["split"].Flag(true));
  stages_.emplace_back([=](const TextPiece& piece, const Sink& sink) {
    AlignedText text = Owned(piece);
    ReplaceText(" ", mark, &text);
    const bool wanted = scheme == "always" || (scheme == "first" && text.at_start);
    if (wanted && !text.text.starts_with(mark)) PrependText(mark, &text);
    const TextPiece marked = View(text);
    if (!split) return sink(marked);
    const auto find = [&](size_t from, size_t* begin, size_t* stop) {
      *begin = marked.text.find(mark, from);
      *stop = *begin + mark.size();
      return *begin != std::string_view::npos;
    };
    SplitBy(marked, Behavior::kMergedWithNext, false, find, sink);
  });
  return OkStatus();
}

void HfPretokenizer::RunFrom(size_t stage, const TextPiece& text, const Sink& sink) const {
  if (text.text.empty()) return;
  if (stage == stages_.size()) return sink(text);
  if (stage + 1 == stages_.size()) return stages_[stage](text, sink);
  stages_[stage](text, [&](const TextPiece& piece) { RunFrom(stage + 1, piece, sink); });
}

}  // namespace sala::data
