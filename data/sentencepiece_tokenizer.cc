#include "data/sentencepiece_tokenizer.h"

#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "data/sentencepiece_api.h"
#include "data/tokenizer_files.h"

namespace sala::data {
namespace {

constexpr char kSpaceMark[] = "\xe2\x96\x81";  // U+2581

std::string Escaped(const std::string& piece) { return DumpJson(nlohmann::json(piece)); }

std::string SpacesFor(std::string piece) {
  size_t at = 0;
  while ((at = piece.find(kSpaceMark, at)) != std::string::npos) piece.replace(at++, 3, " ");
  return piece;
}

class SentencePieceTokenizer : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string path, std::string bytes,
                         std::unique_ptr<SentencePieceModel> model,
                         std::map<std::string, int32_t> added)
      : path_(std::move(path)), bytes_(std::move(bytes)), model_(std::move(model)) {
    SetAddedTokens(std::move(added));
    name_ = "sentencepiece";
    const std::vector<int> probe = model_->Encode("a");
    dummy_prefix_ = !probe.empty() && SpacesFor(model_->piece(probe[0]))[0] == ' ';
    fingerprint_ = Fingerprint();
    token_bytes_.reserve(static_cast<size_t>(model_->size()));
    for (int id = 0; id < model_->size(); ++id) token_bytes_.push_back(BytesOf(id));
  }

  std::string TokenBytes(int32_t id) const override {
    return id >= 0 && id < model_->size() ? token_bytes_[static_cast<size_t>(id)] : std::string();
  }
  int64_t vocab_size() const override {
    return model_->size() + static_cast<int64_t>(added_tokens().size());
  }
  int32_t bos_id() const override { return model_->bos_id(); }
  int32_t eos_id() const override { return model_->eos_id(); }
  int32_t pad_id() const override { return model_->pad_id() >= 0 ? model_->pad_id() : eos_id(); }
  int32_t unk_id() const override { return model_->unk_id(); }
  std::optional<int32_t> FindToken(const std::string& token) const override {
    if (const auto added = Tokenizer::FindToken(token)) return added;
    const int id = model_->Find(token);
    return id < 0 ? std::nullopt : std::optional<int32_t>(id);
  }
  Status SaveTo(const std::string& directory) const override;

 protected:
  void AppendPieces(std::string_view text, int64_t offset, std::vector<Piece>* out) const override {
    for (const SentencePiece& p : model_->EncodeWithOffsets(text))
      out->push_back({p.id, offset + p.begin});
  }
  void AppendIds(std::string_view text, int64_t offset, std::vector<int32_t>* out) const override {
    const std::vector<int> ids = model_->Encode(text);
    out->insert(out->end(), ids.begin(), ids.end());
  }
  bool adds_dummy_prefix() const override { return dummy_prefix_; }

 private:
  std::string PieceName(int id) const { return id < 0 ? std::string() : model_->piece(id); }

  std::string BytesOf(int id) const {
    if (id == model_->unk_id()) return "\xef\xbf\xbd";
    if (model_->is_control(id)) return "";
    const std::string& piece = model_->piece(id);
    if (model_->is_byte(id))  // "<0x0A>"
      return std::string(1, static_cast<char>(std::strtol(piece.c_str() + 3, nullptr, 16)));
    return SpacesFor(piece);
  }

  // Spec: each piece in id order, then what decides the order of merges (here the scores), then
  // normaliser (inside the model's bytes; the format has no free formatting, so hashing them is
  // exact) and added tokens.
  std::string Fingerprint() const {
    Sha256 sha;
    const auto line = [&](const std::string& text) { sha.Update(text.data(), text.size()); };
    for (int id = 0; id < model_->size(); ++id) {
      char score[40];
      std::snprintf(score, sizeof score, "\t%a\n", static_cast<double>(model_->score(id)));
      line(std::to_string(id) + "\t" + Escaped(model_->piece(id)) + score);
    }
    line("model\t" + Sha256Hex(bytes_) + "\n");
    line(nlohmann::json(added_tokens()).dump());
    return sha.HexDigest();
  }

  std::string path_;
  std::string bytes_;
  std::unique_ptr<SentencePieceModel> model_;
  std::vector<std::string> token_bytes_;
  bool dummy_prefix_ = false;
};

Status SentencePieceTokenizer::SaveTo(const std::string& directory) const {
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  const std::string from = path_.substr(0, path_.find_last_of('/') + 1);
  // A tokenizer.json beside it is left behind: readers would take that one, and here the model was
  // chosen.
  SALA_RETURN_IF_ERROR(
      CopyTokenizerFiles(from.empty() ? "." : from, directory, /*without=*/kHfTokenizerFile)
          .status());
  // The vocabulary itself, whatever it is called and may have become since it was read.
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/" + kSentencePieceFile, bytes_));
  return WriteTokenizerConfigs(*this, directory,
                               {.tokenizer_class = "LlamaTokenizer",
                                .unk = PieceName(unk_id()),
                                .bos = PieceName(bos_id()),
                                .eos = PieceName(eos_id()),
                                .pad = PieceName(pad_id())});
}

// added_tokens.json: ids must be exactly those after the pieces, each once.
StatusOr<std::map<std::string, int32_t>> ReadAddedTokens(const std::string& path, int pieces) {
  std::map<std::string, int32_t> added;
  if (!PathExists(path)) return added;
  const auto bad = [&](const std::string& text) {
    return MakeError(ExitCode::kData, "TOK-FORMAT", path + ": " + text + "; copy the files again");
  };
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return bad("not a JSON object of token texts and ids");
  std::vector<bool> used(json.size(), false);
  for (const auto& [token, id] : json.items()) {
    if (!id.is_number_integer())
      return bad("the id of \"" + Printable(token) + "\" is not an integer");
    const int64_t place = id.get<int64_t>() - pieces;
    if (token.empty()) return bad("an added token is empty");
    if (place < 0 || place >= static_cast<int64_t>(used.size()) ||
        used[static_cast<size_t>(place)]) {
      return bad("token \"" + Printable(token) + "\" has id " + id.dump() + "; the " +
                 std::to_string(used.size()) + " added tokens need the ids from " +
                 std::to_string(pieces) + " (after the pieces of the model), each once");
    }
    used[static_cast<size_t>(place)] = true;
    added[token] = id.get<int32_t>();
  }
  return added;
}

}  // namespace

StatusOr<std::unique_ptr<Tokenizer>> LoadSentencePieceTokenizer(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(std::string bytes, ReadFile(path));
  std::string error;
  auto model = SentencePieceModel::FromBytes(bytes, &error);
  if (model == nullptr) {
    return MakeError(ExitCode::kData, "TOK-FORMAT",
                     path + ": not a SentencePiece model of " + std::to_string(bytes.size()) +
                         " bytes (" + Printable(error) + "); copy the file again");
  }
  const std::string directory = path.substr(0, path.find_last_of('/') + 1);
  SALA_ASSIGN_OR_RETURN(auto added, ReadAddedTokens(directory + kAddedTokensFile, model->size()));
  return std::unique_ptr<Tokenizer>(std::make_unique<SentencePieceTokenizer>(
      path, std::move(bytes), std::move(model), std::move(added)));
}

}  // namespace sala::data
