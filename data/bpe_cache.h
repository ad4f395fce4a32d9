// The tokens of pieces that a thread has seen before (data/bpe.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "core/hash.h"

namespace sala::data {

// At most 64 K pieces of at most 64 bytes. When it is full it starts again from nothing: frequent
// pieces are back after a moment, and no bookkeeping is spent on which those are.
class PieceCache {
 public:
  static constexpr size_t kMaxPieceBytes = 64;
  static constexpr size_t kMaxTokens = 255;

  struct Entry {
    const char* ids;     // int32 values, not aligned
    const char* begins;  // a byte each: where in the piece each token starts
    size_t tokens;
  };

  PieceCache() { Clear(); }

  bool Find(std::string_view piece, uint64_t hash, Entry* entry) const {
    for (size_t at = hash & kMask;; at = (at + 1) & kMask) {
      const Slot& slot = slots_[at];
      if (slot.bytes == 0) return false;
      if (slot.hash != hash || slot.bytes != piece.size()) continue;
      const char* key = bytes_.data() + slot.at;
      if (std::memcmp(key, piece.data(), piece.size()) != 0) continue;
      *entry = {key + slot.bytes, key + slot.bytes + slot.tokens * sizeof(int32_t), slot.tokens};
      return true;
    }
  }

  // `piece` is not empty and not there yet; `begins` is in bytes of the piece.
  void Add(std::string_view piece, uint64_t hash, const int32_t* ids, const uint8_t* begins,
           size_t tokens) {
    if (pieces_ == kMaxPieces || bytes_.size() > kMaxBytes) Clear();
    size_t at = hash & kMask;
    while (slots_[at].bytes != 0) at = (at + 1) & kMask;
    slots_[at] = {hash, static_cast<uint32_t>(bytes_.size()), static_cast<uint8_t>(piece.size()),
                  static_cast<uint8_t>(tokens)};
    const char* id_bytes = reinterpret_cast<const char*>(ids);
    bytes_.insert(bytes_.end(), piece.begin(), piece.end());
    bytes_.insert(bytes_.end(), id_bytes, id_bytes + tokens * sizeof(int32_t));
    bytes_.insert(bytes_.end(), begins, begins + tokens);
    ++pieces_;
  }

 private:
  static constexpr size_t kMaxPieces = size_t{64} << 10;
  static constexpr size_t kMask = 2 * kMaxPieces - 1;
  static constexpr size_t kMaxBytes = size_t{16} << 20;
  struct Slot {
    uint64_t hash;
    uint32_t at;    // of key, ids and begins in bytes_
    uint8_t bytes;  // of the key; 0: free
    uint8_t tokens;
  };
  void Clear() {
    slots_.assign(kMask + 1, Slot{0, 0, 0, 0});
    bytes_.clear();
    pieces_ = 0;
  }

  std::vector<Slot> slots_;
  std::vector<char> bytes_;
  size_t pieces_ = 0;
};

}  // namespace sala::data
