#include "data/hf_tokenizer.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "core/utf8.h"
#include "data/bpe.h"
#include "data/hf_added_tokens.h"
#include "data/hf_decoder.h"
#include "data/hf_json.h"
#include "data/hf_normalizer.h"
#include "data/hf_pretokenizer.h"
#include "data/hf_special.h"
#include "data/tokenizer_files.h"

namespace sala::data {
namespace {

class HfTokenizer : public Tokenizer {
 public:
  static StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path);

  std::string Decode(std::span<const int32_t> ids) const override {
    std::vector<std::string> pieces;
    pieces.reserve(ids.size());
    for (const int32_t id : ids) {
      if (const std::string* piece = PieceOf(id)) pieces.push_back(*piece);
    }
    return decoder_.Decode(std::move(pieces));
  }
  std::string TokenBytes(int32_t id) const override {
    const std::string* piece = PieceOf(id);
    return piece == nullptr ? std::string() : decoder_.DecodePiece(*piece);
  }
  int64_t vocab_size() const override { return vocab_size_; }
  int32_t bos_id() const override { return special_.bos; }
  int32_t eos_id() const override { return special_.eos; }
  int32_t pad_id() const override { return special_.pad; }
  int32_t unk_id() const override { return special_.unk >= 0 ? special_.unk : bpe_->unk_id(); }
  std::optional<int32_t> FindToken(const std::string& token) const override {
    if (const auto added = Tokenizer::FindToken(token)) return added;
    const int32_t id = bpe_->Find(token);
    return id < 0 ? std::nullopt : std::optional<int32_t>(id);
  }
  void AddSpecial(std::vector<int32_t>* ids) const override {
    ids->insert(ids->begin(), template_.before.begin(), template_.before.end());
    ids->insert(ids->end(), template_.after.begin(), template_.after.end());
  }
  Status SaveTo(const std::string& directory) const override;

 protected:
  std::vector<Part> Split(std::string_view text) const override {
    if (raw_added_.empty()) return {{text, 0, -1}};
    std::vector<Part> parts;
    for (const auto& [begin, end, id] : raw_added_.Split(text))
      parts.push_back({text.substr(begin, end - begin), static_cast<int64_t>(begin), id});
    return parts;
  }
  void AppendPieces(std::string_view text, int64_t offset, std::vector<Piece>* out) const override {
    std::vector<int32_t> ids;
    AppendText(text, offset, &ids, out);
  }
  void AppendIds(std::string_view text, int64_t offset, std::vector<int32_t>* out) const override {
    AppendText(text, offset, out, nullptr);
  }

 private:
  HfTokenizer() = default;
  Status AddTokens(std::vector<HfAddedToken> tokens, const HfNode& node);
  std::string Fingerprint(const nlohmann::json& root) const;

  // The text of a token; null for ids that are none.
  const std::string* PieceOf(int32_t id) const {
    if (id < 0 || id >= vocab_size_) return nullptr;
    const auto added = added_text_.find(id);
    if (added != added_text_.end()) return &added->second;
    return id < bpe_->size() && !bpe_->piece(id).empty() ? &bpe_->piece(id) : nullptr;
  }

  // With `pieces` the tokens go there, with their places, and *ids is work space; else to *ids.
  void AppendText(std::string_view text, int64_t offset, std::vector<int32_t>* ids,
                  std::vector<Piece>* pieces) const;

  std::string directory_;
  std::string bytes_;  // of tokenizer.json
  std::unique_ptr<Bpe> bpe_;
  HfNormalizer normalizer_;
  HfPretokenizer pretokenizer_;
  HfDecoder decoder_;
  HfAddedTokenFinder raw_added_;         // looked for before normalisation
  HfAddedTokenFinder normalized_added_;  // and after
  std::map<int32_t, std::string> added_text_;
  HfTemplate template_;
  HfSpecialIds special_;
  int64_t vocab_size_ = 0;
};

void HfTokenizer::AppendText(std::string_view given, int64_t offset, std::vector<int32_t>* ids,
                             std::vector<Piece>* pieces) const {
  AlignedText text{.text = {}, .tracked = pieces != nullptr, .at_start = offset == 0, .origin = {}};
  TextPiece whole{given, nullptr, text.at_start};
  const bool broken = !IsValidUtf8(given);
  if (broken || text.tracked || !normalizer_.empty()) {
    text.text = given;
    if (text.tracked) {
      text.origin.resize(given.size());
      for (size_t i = 0; i < given.size(); ++i) text.origin[i] = offset + static_cast<int64_t>(i);
    }
    if (broken) RepairUtf8(&text);
    normalizer_.Apply(&text);
    whole = {text.text, text.tracked ? text.origin.data() : nullptr, text.at_start};
  }
  std::vector<uint32_t> begins;
  const auto encode = [&](const TextPiece& piece) {
    if (pieces == nullptr) return bpe_->Encode(piece.text, {ids, nullptr});
    ids->clear();
    begins.clear();
    bpe_->Encode(piece.text, {ids, &begins});
    for (size_t i = 0; i < ids->size(); ++i)
      pieces->push_back({(*ids)[i], piece.origin[begins[i]]});
  };
  const auto run = [&](size_t begin, size_t end) {
    pretokenizer_.Run(
        {whole.text.substr(begin, end - begin),
         whole.origin == nullptr ? nullptr : whole.origin + begin, whole.at_start && begin == 0},
        encode);
  };
  if (normalized_added_.empty()) return run(0, whole.text.size());
  for (const auto& [begin, end, id] : normalized_added_.Split(whole.text)) {
    if (id < 0) {
      run(begin, end);
    } else if (pieces != nullptr) {
      pieces->push_back({id, whole.origin[begin]});
    } else {
      ids->push_back(id);
    }
  }
}

// Ids of added tokens are not free: a token that is a piece has the piece's, the others are counted
// on. The library goes by that and not by the ids in the file, so these must agree.
Status HfTokenizer::AddTokens(std::vector<HfAddedToken> tokens, const HfNode& node) {
  SALA_ASSIGN_OR_RETURN(const auto list, node.is_null()
                                             ? StatusOr<std::vector<HfNode>>(std::vector<HfNode>())
                                             : node.List());
  std::map<std::string, int32_t> added;
  int32_t largest = -1;
  vocab_size_ = bpe_->size();
  for (size_t i = 0; i < tokens.size(); ++i) {
    const HfAddedToken& token = tokens[i];
    const int32_t piece = bpe_->Find(token.content);
    const int32_t next = largest >= bpe_->pieces() ? largest + 1 : bpe_->pieces();
    const int32_t expected = piece >= 0 ? piece : next;
    if (token.id != expected) {
      return list[i]["id"].Malformed(
          std::to_string(expected) + " for " + Printable(token.content) +
          (piece >= 0 ? ", which is a piece of the model" : ", the first id that is free"));
    }
    largest = std::max(largest, token.id);
    added[token.content] = token.id;
    added_text_[token.id] = token.content;
    vocab_size_ = std::max(vocab_size_, int64_t{token.id} + 1);
  }
  // The library puts special tokens first, which decides between two that read the same when
  // normalised.
  std::stable_partition(tokens.begin(), tokens.end(),
                        [](const HfAddedToken& token) { return token.special; });
  for (const HfAddedToken& token : tokens) {
    if (!token.normalized) {
      raw_added_.Add(token.content, token);
      continue;
    }
    AlignedText pattern{.text = token.content, .tracked = false, .at_start = true, .origin = {}};
    normalizer_.Apply(&pattern);
    normalized_added_.Add(pattern.text, token);
  }
  SetAddedTokens(std::move(added));
  return OkStatus();
}

std::string HfTokenizer::Fingerprint(const nlohmann::json& root) const {
  Sha256 sha;
  bpe_->Describe([&](const std::string& line) { sha.Update(line.data(), line.size()); });
  nlohmann::json added = root.value("added_tokens", nlohmann::json::array());
  std::sort(added.begin(), added.end(), [](const nlohmann::json& a, const nlohmann::json& b) {
    return a["id"].get<int64_t>() < b["id"].get<int64_t>();
  });
  for (const auto& [name, json] :
       {std::pair<std::string, nlohmann::json>{"added_tokens", added},
        {"normalizer", root.value("normalizer", nlohmann::json())},
        {"pre_tokenizer", root.value("pre_tokenizer", nlohmann::json())},
        {"post_processor", root.value("post_processor", nlohmann::json())}}) {
    const std::string line = name + " " + json.dump() + "\n";
    sha.Update(line.data(), line.size());
  }
  return sha.HexDigest();
}

StatusOr<std::unique_ptr<Tokenizer>> HfTokenizer::Load(const std::string& path) {
  std::unique_ptr<HfTokenizer> made(new HfTokenizer);
  const size_t slash = path.find_last_of('/');
  made->directory_ = slash == std::string::npos ? "." : path.substr(0, slash);
  made->name_ = kHfTokenizerFile;
  SALA_ASSIGN_OR_RETURN(made->bytes_, ReadFile(path));
  const nlohmann::json json = ParseJson(made->bytes_);
  if (!json.is_object()) {
    return MakeError(ExitCode::kData, "TOK-FORMAT",
                     path + ": the " + std::to_string(made->bytes_.size()) +
                         " bytes are not a JSON object, expected a tokenizer.json; copy the "
                         "tokenizer's files again");
  }
  const HfNode root(&json, &path);
  SALA_RETURN_IF_ERROR(
      root.OnlyKeys({"version", "truncation", "padding", "added_tokens", "normalizer",
                     "pre_tokenizer", "post_processor", "decoder", "model"}));
  for (const char* key : {"truncation", "padding"}) {
    if (!root[key].is_null()) return root[key].Unsupported("null is: texts are encoded whole");
  }
  SALA_ASSIGN_OR_RETURN(made->normalizer_, HfNormalizer::Read(root["normalizer"]));
  SALA_ASSIGN_OR_RETURN(made->pretokenizer_, HfPretokenizer::Read(root["pre_tokenizer"]));
  SALA_ASSIGN_OR_RETURN(std::vector<HfAddedToken> added, ReadAddedTokens(root["added_tokens"]));
  SALA_ASSIGN_OR_RETURN(made->bpe_,
                        Bpe::Read(root["model"], made->pretokenizer_.byte_level(), added.size()));
  SALA_RETURN_IF_ERROR(made->AddTokens(std::move(added), root["added_tokens"]));
  SALA_ASSIGN_OR_RETURN(made->decoder_, HfDecoder::Read(root["decoder"]));
  SALA_ASSIGN_OR_RETURN(made->template_,
                        ReadPostProcessor(root["post_processor"], made->vocab_size_));
  SALA_ASSIGN_OR_RETURN(made->special_, ReadSpecialIds(made->directory_, made->vocab_size_,
                                                       [&](const std::string& token) {
                                                         return made->FindToken(token);
                                                       }));
  made->fingerprint_ = made->Fingerprint(json);
  return std::unique_ptr<Tokenizer>(std::move(made));
}

Status HfTokenizer::SaveTo(const std::string& directory) const {
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  SALA_RETURN_IF_ERROR(CopyTokenizerFiles(directory_, directory).status());
  // The vocabulary itself, whatever it is called and may have become since it was read.
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/" + kHfTokenizerFile, bytes_));
  const std::string path = directory + "/generation_config.json";
  if (!special_.of_model || PathExists(path)) return OkStatus();
  nlohmann::json ids = nlohmann::json::object();
  if (special_.bos >= 0) ids["bos_token_id"] = special_.bos;
  if (special_.eos >= 0) ids["eos_token_id"] = special_.eos;
  if (special_.pad >= 0) ids["pad_token_id"] = special_.pad;
  return WriteFileAtomically(path, ids.dump(2) + "\n");
}

}  // namespace

StatusOr<std::unique_ptr<Tokenizer>> LoadHfTokenizer(const std::string& path) {
  return HfTokenizer::Load(path);
}

}  // namespace sala::data
