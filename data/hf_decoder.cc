#include "data/hf_decoder.h"

#include <cstdlib>
#include <utility>

#include "core/utf8.h"
#include "data/bpe.h"

namespace sala::data {
namespace {

constexpr char kWhatIsRead[] =
    "Sequence, ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace and null are";

void Join(std::vector<std::string>* pieces) {
  std::string all;
  for (const std::string& piece : *pieces) all += piece;
  pieces->clear();
  pieces->push_back(std::move(all));
}

// The library takes a piece with a character that stands for no byte as it is.
void JoinByteLevel(std::vector<std::string>* pieces) {
  std::string bytes;
  for (std::string& piece : *pieces) {
    if (BytesOfByteLevel(piece, &bytes)) piece = bytes;
  }
  Join(pieces);
}

// "<0x0A>": the byte.
bool IsByte(const std::string& piece) {
  return piece.size() == 6 && piece.starts_with("<0x") && piece[5] == '>' &&
         piece.find_first_not_of("0123456789abcdefABCDEF", 3) == 5;
}

void JoinBytes(std::vector<std::string>* pieces) {
  std::vector<std::string> joined;
  bool after_byte = false;
  for (std::string& piece : *pieces) {
    const bool byte = IsByte(piece);
    if (byte)
      piece.assign(1, static_cast<char>(std::strtol(piece.substr(3, 2).c_str(), nullptr, 16)));
    if (byte && after_byte) {
      joined.back() += piece;
    } else {
      joined.push_back(std::move(piece));
    }
    after_byte = byte;
  }
  *pieces = std::move(joined);
}

void ReplaceAll(const std::string& pattern, const std::string& content, std::string* text) {
  size_t hit = text->find(pattern);
  if (hit == std::string::npos) return;
  std::string made;
  size_t begin = 0;
  for (; hit != std::string::npos; hit = text->find(pattern, begin)) {
    made.append(*text, begin, hit - begin).append(content);
    begin = hit + pattern.size();
  }
  *text = made.append(*text, begin);
}

void StripEnds(const std::string& mark, int64_t start, int64_t stop, std::string* text) {
  for (int64_t i = 0; i < start && text->starts_with(mark); ++i) text->erase(0, mark.size());
  for (int64_t i = 0; i < stop && text->ends_with(mark); ++i)
    text->resize(text->size() - mark.size());
}

StatusOr<std::string> OneCharacter(const HfNode& node) {
  SALA_ASSIGN_OR_RETURN(const std::string mark, node.Text());
  if (mark.empty() || Utf8SequenceLength(mark, 0) != mark.size())
    return node.Malformed("one character");
  return mark;
}

}  // namespace

StatusOr<HfDecoder> HfDecoder::Read(const HfNode& decoder) {
  HfDecoder made;
  bool fused = false;
  if (decoder.is_null()) {
    made.between_ = " ";
  } else {
    SALA_RETURN_IF_ERROR(made.Add(decoder, &fused));
  }
  return made;
}

Status HfDecoder::Add(const HfNode& node, bool* fused) {
  SALA_ASSIGN_OR_RETURN(const std::string type, node.Type());
  if (type == "Sequence") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "decoders"}));
    SALA_ASSIGN_OR_RETURN(const auto list, node["decoders"].List());
    for (const HfNode& each : list) SALA_RETURN_IF_ERROR(Add(each, fused));
  } else if (type == "ByteLevel") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "add_prefix_space", "trim_offsets", "use_regex"}));
    steps_.push_back({&JoinByteLevel, false});
    *fused = true;
  } else if (type == "ByteFallback") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type"}));
    steps_.push_back({&JoinBytes, false});
  } else if (type == "Fuse") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type"}));
    steps_.push_back({&Join, false});
    *fused = true;
  } else if (type == "Replace") {
    SALA_ASSIGN_OR_RETURN(const LiteralReplace replace, ReadLiteralReplace(node));
    steps_.push_back({[=](Pieces* pieces) {
                        for (std::string& piece : *pieces)
                          ReplaceAll(replace.pattern, replace.content, &piece);
                      },
                      false});
  } else if (type == "Strip") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys({"type", "content", "start", "stop"}));
    SALA_ASSIGN_OR_RETURN(const std::string mark, OneCharacter(node["content"]));
    SALA_ASSIGN_OR_RETURN(const int64_t start, node["start"].Number(kMaxVocabulary));
    SALA_ASSIGN_OR_RETURN(const int64_t stop, node["stop"].Number(kMaxVocabulary));
    steps_.push_back({[=](Pieces* pieces) {
                        for (std::string& piece : *pieces) StripEnds(mark, start, stop, &piece);
                      },
                      *fused});
  } else if (type == "Metaspace") {
    SALA_RETURN_IF_ERROR(node.OnlyKeys(
        {"type", "replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"}));
    SALA_ASSIGN_OR_RETURN(const std::string mark, OneCharacter(node["replacement"]));
    std::string scheme = "always";
    if (!node["prepend_scheme"].is_null()) {
      SALA_ASSIGN_OR_RETURN(scheme, node["prepend_scheme"].Text());
    } else {
      SALA_ASSIGN_OR_RETURN(const bool prefix, node["add_prefix_space"].Flag(true));
      if (!prefix) scheme = "never";
    }
    // Two steps: the marks of the first piece go where one was put in front; all others are spaces.
    if (scheme != "never") {
      steps_.push_back({[=](Pieces* pieces) {
                          if (!pieces->empty()) ReplaceAll(mark, "", &pieces->front());
                        },
                        true});
    }
    steps_.push_back({[=](Pieces* pieces) {
                        for (std::string& piece : *pieces) ReplaceAll(mark, " ", &piece);
                      },
                      false});
  } else {
    return node["type"].Unsupported(kWhatIsRead);
  }
  return OkStatus();
}

std::string HfDecoder::Decode(std::vector<std::string> pieces) const {
  for (const Step& step : steps_) step.run(&pieces);
  std::string text;
  for (size_t i = 0; i < pieces.size(); ++i) text += (i == 0 ? "" : between_) + pieces[i];
  return text;
}

std::string HfDecoder::DecodePiece(const std::string& piece) const {
  std::vector<std::string> pieces = {piece};
  for (const Step& step : steps_) {
    if (!step.ends_only) step.run(&pieces);
  }
  return pieces.empty() ? std::string() : pieces.front();
}

}  // namespace sala::data
