// The SentencePiece library behind a plain interface.
//
// Why a wall: the library's headers declare absl::string_view as an alias of std::string_view,
// Debian's Abseil defines a class of that name; a source file can include one of the two, not both.
// Only sentencepiece_api.cc includes the library, and this header uses standard types only.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace sala::data {

struct SentencePiece {
  int32_t id;
  int64_t begin;  // byte of the text where the piece starts
};

class SentencePieceModel {
 public:
  // Null when the bytes are not a model; then *error says why.
  static std::unique_ptr<SentencePieceModel> FromBytes(const std::string& bytes,
                                                       std::string* error);
  SentencePieceModel(const SentencePieceModel&) = delete;
  SentencePieceModel& operator=(const SentencePieceModel&) = delete;
  ~SentencePieceModel();

  std::vector<int> Encode(std::string_view text) const;
  std::vector<SentencePiece> EncodeWithOffsets(std::string_view text) const;

  int size() const;
  int unk_id() const;
  int bos_id() const;  // -1: none; likewise below
  int eos_id() const;
  int pad_id() const;
  const std::string& piece(int id) const;
  float score(int id) const;
  bool is_control(int id) const;
  bool is_byte(int id) const;
  int Find(const std::string& piece) const;  // -1: no such piece

 private:
  SentencePieceModel();
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct SentencePieceTraining {
  int vocab_size = 0;  // pieces of the model
  double character_coverage = 1.0;
  int max_piece_length = 16;
};

// Trains BPE with byte fallback on the sentences that `next` gives until it returns false. Identity
// normalisation, no dummy prefix, spaces kept as they are, one thread, no log lines. Returns "" and
// the model's bytes, or the library's error text.
std::string TrainSentencePieceModel(const SentencePieceTraining& training,
                                    const std::function<bool(std::string*)>& next,
                                    std::string* model);

}  // namespace sala::data
