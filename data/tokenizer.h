// Text <-> token ids.
//
//   SALA_ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, LoadTokenizer("tokenizer/"));
//   std::vector<int32_t> ids = tokenizer->Encode("two words");      // no bos, no eos
//   std::string text = tokenizer->Decode(ids);                      // the same bytes again
//
// Added tokens (the ChatML markers, for example) are split off the text before the model sees it:
// leftmost first, the longest of those that start at one place. Everything else goes through the
// model, piece by piece between markers.
//
// Three kinds:
//   * `tokenizer.json` of Hugging Face: byte-pair encoding with byte fallback (Llama 2, MiniCPM) or
//   on bytes (Qwen, Llama 3); data/hf_tokenizer.h;
//   * SentencePiece: `tokenizer.model`, with `added_tokens.json` {"<|im_end|>": id, ...} beside it
//   if there are any;
//   * bytes: 256 byte values, then bos 256, eos 257, pad 258, <|im_start|> 259, <|im_end|> 260. The
//   word "bytes" names it.
//
// A tokenizer trained by TrainSentencePiece (data/train_tokenizer.h) gives back every UTF-8 text
// exactly, with one exception of the SentencePiece format: the character U+2581, which the format
// uses for the space, comes back as a space.
//
// Encoding and decoding may be called from several threads at once.
//
// Errors: TOK-MISSING (66), TOK-FORMAT (65), TOK-UNSUPPORTED (65), TOK-VOCAB (65).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace sala::data {

inline constexpr char kImStart[] = "<|im_start|>";
inline constexpr char kImEnd[] = "<|im_end|>";

class Tokenizer {
 public:
  struct Piece {
    int32_t id;
    int64_t
        begin;  // byte of the text where the token starts; the bytes of one character may share it
  };

  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;
  virtual ~Tokenizer() = default;

  std::vector<int32_t> Encode(std::string_view text) const;
  std::vector<Piece> EncodeWithOffsets(std::string_view text) const;

  // Puts around the ids of a text what its makers put around it when they run the model: bos, or
  // what the post-processor of a tokenizer.json says.
  virtual void AddSpecial(std::vector<int32_t>* ids) const;

  // Added tokens are shown as their text; bos, eos and pad as nothing, unless they are added
  // tokens; unk as U+FFFD. Bytes that are no UTF-8 stay as they are. A tokenizer.json has a decoder
  // of its own, which is done as it says.
  virtual std::string Decode(std::span<const int32_t> ids) const;
  // The bytes one token adds to the text. For showing text while it is generated use StreamDecoder.
  virtual std::string TokenBytes(int32_t id) const = 0;

  virtual int64_t vocab_size() const = 0;  // added tokens included
  virtual int32_t bos_id() const = 0;      // -1: none; likewise below
  virtual int32_t eos_id() const = 0;
  virtual int32_t pad_id() const = 0;
  virtual int32_t unk_id() const = 0;
  const std::map<std::string, int32_t>& added_tokens() const { return added_; }
  // The id of an added token, or of a piece of the model.
  virtual std::optional<int32_t> FindToken(const std::string& token) const;

  // SHA-256 over the vocabulary in canonical form; equal fingerprints give equal ids for every
  // text.
  const std::string& fingerprint() const { return fingerprint_; }
  const std::string& name() const { return name_; }

  // Writes the tokenizer's files (those it was read from, byte for byte) and, where they did not
  // exist, tokenizer_config.json and special_tokens_map.json.
  virtual Status SaveTo(const std::string& directory) const = 0;

 protected:
  Tokenizer() = default;
  struct Part {
    std::string_view text;
    int64_t offset;
    int32_t added_id;  // -1: ordinary text
  };
  // The parts of a text, in order: added tokens and what is between them.
  virtual std::vector<Part> Split(std::string_view text) const;
  // `offset`: of the ordinary text in the whole one.
  virtual void AppendPieces(std::string_view text, int64_t offset,
                            std::vector<Piece>* out) const = 0;
  virtual void AppendIds(std::string_view text, int64_t offset,
                         std::vector<int32_t>* out) const = 0;
  virtual bool adds_dummy_prefix() const { return false; }
  void SetAddedTokens(std::map<std::string, int32_t> added);

  std::string fingerprint_;
  std::string name_;

 private:
  std::map<std::string, int32_t> added_;
  std::map<int32_t, std::string> added_by_id_;
  std::vector<std::pair<std::string, int32_t>> longest_first_;
};

// Turns ids into text while they arrive: gives only whole UTF-8 characters and keeps the rest for
// the next call.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer* tokenizer) : tokenizer_(tokenizer) {}
  std::string Push(int32_t id);
  std::string Finish();  // what is left, broken bytes as U+FFFD

 private:
  const Tokenizer* tokenizer_;
  std::string rest_;
};

// A directory with byte_tokenizer.json, tokenizer.json or tokenizer.model (the first of them that
// is there), such a file, or the word "bytes".
StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& path);

std::unique_ptr<Tokenizer> MakeByteTokenizer();

}  // namespace sala::data
