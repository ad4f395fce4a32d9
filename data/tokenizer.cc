#include "data/tokenizer.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/utf8.h"
#include "data/hf_tokenizer.h"
#include "data/sentencepiece_tokenizer.h"
#include "data/tokenizer_files.h"
#include "data/utf8.h"

namespace sala::data {

void Tokenizer::SetAddedTokens(std::map<std::string, int32_t> added) {
  added_ = std::move(added);
  added_by_id_.clear();
  longest_first_.assign(added_.begin(), added_.end());
  for (const auto& [text, id] : added_) added_by_id_[id] = text;
  std::stable_sort(longest_first_.begin(), longest_first_.end(),
                   [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
}

std::vector<Tokenizer::Part> Tokenizer::Split(std::string_view text) const {
  std::string first_bytes;
  for (const auto& [token, id] : longest_first_) {
    if (first_bytes.find(token[0]) == std::string::npos) first_bytes += token[0];
  }
  std::vector<Part> parts;
  size_t begin = 0;
  size_t at = first_bytes.empty() ? std::string_view::npos : text.find_first_of(first_bytes);
  while (at != std::string_view::npos) {
    const auto hit = std::find_if(longest_first_.begin(), longest_first_.end(), [&](const auto& t) {
      return text.compare(at, t.first.size(), t.first) == 0;
    });
    if (hit == longest_first_.end()) {
      at = text.find_first_of(first_bytes, at + 1);
      continue;
    }
    if (at > begin)
      parts.push_back({text.substr(begin, at - begin), static_cast<int64_t>(begin), -1});
    parts.push_back({hit->first, static_cast<int64_t>(at), hit->second});
    begin = at + hit->first.size();
    at = text.find_first_of(first_bytes, begin);
  }
  if (begin < text.size()) parts.push_back({text.substr(begin), static_cast<int64_t>(begin), -1});
  return parts;
}

std::vector<int32_t> Tokenizer::Encode(std::string_view text) const {
  std::vector<int32_t> ids;
  for (const Part& part : Split(text)) {
    if (part.added_id >= 0) {
      ids.push_back(part.added_id);
    } else {
      AppendIds(part.text, part.offset, &ids);
    }
  }
  return ids;
}

std::vector<Tokenizer::Piece> Tokenizer::EncodeWithOffsets(std::string_view text) const {
  std::vector<Piece> pieces;
  for (const Part& part : Split(text)) {
    if (part.added_id >= 0) {
      pieces.push_back({part.added_id, part.offset});
    } else {
      AppendPieces(part.text, part.offset, &pieces);
    }
  }
  return pieces;
}

void Tokenizer::AddSpecial(std::vector<int32_t>* ids) const {
  if (bos_id() >= 0) ids->insert(ids->begin(), bos_id());
}

std::string Tokenizer::Decode(std::span<const int32_t> ids) const {
  std::string text;
  bool piece_start = true;  // the model puts its mark in front of each part between added tokens
  for (const int32_t id : ids) {
    const auto added = added_by_id_.find(id);
    if (added != added_by_id_.end()) {
      text += added->second;
      piece_start = true;
      continue;
    }
    std::string bytes = TokenBytes(id);
    if (bytes.empty()) continue;
    if (piece_start && adds_dummy_prefix() && bytes[0] == ' ') bytes.erase(0, 1);
    piece_start = false;
    text += bytes;
  }
  return text;
}

std::optional<int32_t> Tokenizer::FindToken(const std::string& token) const {
  const auto hit = added_.find(token);
  return hit == added_.end() ? std::nullopt : std::optional<int32_t>(hit->second);
}

std::string StreamDecoder::Push(int32_t id) {
  const auto& added = tokenizer_->added_tokens();
  const auto hit =
      std::find_if(added.begin(), added.end(), [&](const auto& t) { return t.second == id; });
  rest_ += hit != added.end() ? hit->first : tokenizer_->TokenBytes(id);
  std::string out;
  size_t at = 0;
  while (at < rest_.size()) {
    const size_t length = Utf8SequenceLength(rest_, at);
    if (length > 0) {
      out.append(rest_, at, length);
      at += length;
    } else if (rest_.size() - at < 4) {
      break;  // may become a character with the next token
    } else {
      out += "\xef\xbf\xbd";
      ++at;
    }
  }
  rest_.erase(0, at);
  return out;
}

std::string StreamDecoder::Finish() { return ReplaceInvalidUtf8(std::exchange(rest_, {})); }

namespace {

class ByteTokenizer : public Tokenizer {
 public:
  ByteTokenizer() {
    SetAddedTokens({{kImStart, kImStartId}, {kImEnd, kImEndId}});
    name_ = "bytes";
    fingerprint_ = Sha256Hex("byte tokenizer, version 1: bos 256, eos 257, pad 258, " +
                             std::string(kImStart) + " 259, " + kImEnd + " 260");
  }
  std::string TokenBytes(int32_t id) const override {
    return id >= 0 && id < 256 ? std::string(1, static_cast<char>(id)) : std::string();
  }
  int64_t vocab_size() const override { return kImEndId + 1; }
  int32_t bos_id() const override { return 256; }
  int32_t eos_id() const override { return 257; }
  int32_t pad_id() const override { return 258; }
  int32_t unk_id() const override { return -1; }

  Status SaveTo(const std::string& directory) const override {
    SALA_RETURN_IF_ERROR(MakeDirectories(directory));
    SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/" + kByteTokenizerFile,
                                             "{\"type\": \"bytes\", \"version\": 1}\n"));
    return WriteTokenizerConfigs(*this, directory,
                                 {.tokenizer_class = "PreTrainedTokenizerFast",
                                  .unk = "",
                                  .bos = "<s>",
                                  .eos = "</s>",
                                  .pad = "<pad>"});
  }

 protected:
  void AppendPieces(std::string_view text, int64_t offset, std::vector<Piece>* out) const override {
    for (const char c : text) out->push_back({static_cast<uint8_t>(c), offset++});
  }
  void AppendIds(std::string_view text, int64_t offset, std::vector<int32_t>* out) const override {
    for (const char c : text) out->push_back(static_cast<uint8_t>(c));
  }

 private:
  static constexpr int32_t kImStartId = 259;
  static constexpr int32_t kImEndId = 260;
};

}  // namespace

std::unique_ptr<Tokenizer> MakeByteTokenizer() { return std::make_unique<ByteTokenizer>(); }

StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& path) {
  if (path == "bytes") return MakeByteTokenizer();
  if (!PathExists(path)) {
    return MakeError(ExitCode::kNoInput, "TOK-MISSING",
                     path +
                         ": no such tokenizer; give a directory with tokenizer.json or "
                         "tokenizer.model, or \"bytes\"");
  }
  if (!IsDirectory(path)) {
    const std::string name = path.substr(path.find_last_of('/') + 1);  // npos + 1 == 0
    if (name == kByteTokenizerFile) return MakeByteTokenizer();
    if (name.ends_with(".json")) return LoadHfTokenizer(path);
    return LoadSentencePieceTokenizer(path);
  }
  // A file of ours alone, so where it is there it is meant.
  if (PathExists(path + "/" + kByteTokenizerFile)) return MakeByteTokenizer();
  if (PathExists(path + "/" + kHfTokenizerFile))
    return LoadHfTokenizer(path + "/" + kHfTokenizerFile);
  if (PathExists(path + "/" + kSentencePieceFile))
    return LoadSentencePieceTokenizer(path + "/" + kSentencePieceFile);
  return MakeError(ExitCode::kNoInput, "TOK-MISSING",
                   path +
                       ": the directory has no tokenizer.json and no tokenizer.model; put the "
                       "tokenizer's files there");
}

}  // namespace sala::data
