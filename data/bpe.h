// Byte-pair encoding with the vocabulary and the merges of a tokenizer.json.
//
// A piece of text starts as its characters (for byte-level models: its bytes). Then the adjacent
// pair whose merge stands first in the list is joined, leftmost first, until no pair has a merge:
// with a heap, n log n. Pieces of at most 64 bytes are remembered by each thread.
//
// Models without a pre-tokenizer give a whole document as one piece. It is cut first, which is
// exact: between two characters that are the end of the left side and the start of the right side
// of no merge, nothing is ever joined, and what happens on one side does not depend on the other.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/status.h"
#include "data/hf_json.h"

namespace sala::data {

inline constexpr uint64_t kMaxVocabulary = uint64_t{1} << 24;

// A map from pairs of ids. Open addressing; at most half full.
class PairTable {
 public:
  struct Value {
    int32_t rank = -1;
    int32_t id = -1;
  };
  explicit PairTable(size_t pairs);
  void Set(int32_t left, int32_t right, Value value);
  const Value* Find(int32_t left, int32_t right) const {
    const uint64_t key = Key(left, right);
    for (size_t at = Place(key);; at = (at + 1) & mask_) {
      if (slots_[at].key == key) return &slots_[at].value;
      if (slots_[at].key == kEmpty) return nullptr;
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Slot {
    uint64_t key = kEmpty;
    Value value;
  };
  static uint64_t Key(int32_t left, int32_t right) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) |
           static_cast<uint32_t>(right);
  }
  size_t Place(uint64_t key) const {
    return static_cast<size_t>((key * 0x9E3779B97F4A7C15u) >> 32) & mask_;
  }
  std::vector<Slot> slots_;
  size_t mask_;
};

class Bpe {
 public:
  struct Output {
    std::vector<int32_t>* ids;
    std::vector<uint32_t>* begins;  // byte of the piece where each token starts; null: not wanted
  };

  // `model`: the "model" of a tokenizer.json. With `byte_level` a piece is bytes and the vocabulary
  // spells them as the characters of ByteLevel. `added_tokens`: how many there are beside the
  // model. TOK-FORMAT, TOK-UNSUPPORTED.
  static StatusOr<std::unique_ptr<Bpe>> Read(const HfNode& model, bool byte_level,
                                             size_t added_tokens);

  // One past the largest id; ids between may be unused.
  int32_t size() const { return static_cast<int32_t>(pieces_.size()); }
  // How many ids are used; the library's own rule for ids of added tokens counts so.
  int32_t pieces() const { return static_cast<int32_t>(ids_.size()); }
  const std::string& piece(int32_t id) const { return pieces_[static_cast<size_t>(id)]; }
  int32_t Find(std::string_view piece) const;  // -1: no such piece
  int32_t unk_id() const { return unk_; }
  bool byte_fallback() const { return byte_fallback_; }
  // Lines that say all that decides ids, for a fingerprint.
  void Describe(const std::function<void(const std::string&)>& line) const;

  // Appends the tokens of one piece, which is not empty, at most 2^31 bytes long and, unless
  // byte_level, well-formed UTF-8. Safe to call from several threads.
  void Encode(std::string_view piece, const Output& out) const;

 private:
  struct Merge {
    int32_t left, right, id;
  };
  struct Space;

  Bpe() = default;
  Status ReadVocabulary(const HfNode& vocab, size_t added_tokens);
  Status ReadMerges(const HfNode& merges);
  Status ReadUnknown(const HfNode& unk_token);
  void MakeSymbols();
  void MakeBorders();
  bool FallsBack(std::string_view character) const;
  int32_t SymbolOf(uint32_t code_point) const;  // -1: the character is not in the vocabulary
  void EncodeWord(std::string_view word, size_t begin, Space& space, const Output& out) const;
  void EncodeCut(std::string_view piece, Space& space, const Output& out) const;
  void MergeWord(std::string_view word, Space& space) const;

  bool byte_level_ = false;
  bool byte_fallback_ = false;
  bool fuse_unk_ = false;
  bool ignore_merges_ = false;
  int32_t unk_ = -1;
  uint64_t serial_ = 0;  // names this object among all of the process, for the caches of threads
  std::vector<std::string> pieces_;
  std::unordered_map<std::string_view, int32_t> ids_;  // views into pieces_
  std::vector<Merge> merges_;
  std::unique_ptr<PairTable> table_;
  // The pairs of characters that a merge may reach across.
  std::unique_ptr<PairTable> borders_;
  std::array<int32_t, 256> fallback_;  // <0xNN>; -1: not in the vocabulary
  std::array<int32_t, 256> bytes_;     // byte-level: the character of each byte
  std::vector<int32_t> bmp_symbols_;   // of the characters below U+10000
  std::unordered_map<uint32_t, int32_t> other_symbols_;
};

// The character, as UTF-8, by which ByteLevel spells a byte.
const std::string& ByteLevelCharacter(uint8_t byte);
// The bytes that characters of ByteLevel stand for; false where one stands for none.
bool BytesOfByteLevel(std::string_view characters, std::string* bytes);

}  // namespace sala::data
