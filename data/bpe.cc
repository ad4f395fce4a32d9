#include "data/bpe.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <functional>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/json.h"
#include "data/bpe_cache.h"
#include "data/code_points.h"

namespace sala::data {
namespace {

constexpr uint32_t kNone = ~uint32_t{0};
constexpr uint32_t kBmp = 0x10000;

struct Symbol {
  int32_t id;
  uint32_t begin;     // byte of the word
  uint32_t previous;  // kNone: the first; a symbol that was joined to its left has itself here
  uint32_t next;      // kNone: the last
};

struct Candidate {
  uint64_t order;  // rank, then position
  int32_t id;
  // std::push_heap keeps the largest on top; here the smallest order belongs there.
  bool operator<(const Candidate& other) const { return order > other.order; }
};

uint64_t NextSerial() {
  static std::atomic<uint64_t> serial{0};
  return ++serial;
}

std::string FallbackName(int byte) {
  char name[8];
  std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
  return name;
}

}  // namespace

PairTable::PairTable(size_t pairs) {
  size_t slots = 16;
  while (slots < 2 * pairs) slots *= 2;
  slots_.resize(slots);
  mask_ = slots - 1;
}

void PairTable::Set(int32_t left, int32_t right, Value value) {
  const uint64_t key = Key(left, right);
  size_t at = Place(key);
  while (slots_[at].key != kEmpty && slots_[at].key != key) at = (at + 1) & mask_;
  slots_[at] = {key, value};
}

// What a thread needs for encoding. A thread remembers the pieces of the four models it used last.
struct Bpe::Space {
  static Space& OfThread(uint64_t serial) {
    thread_local Space space;
    if (space.caches[space.current].serial != serial) space.Choose(serial);
    return space;
  }
  PieceCache& cache() { return *caches[current].pieces; }

  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
  std::vector<int32_t> ids;
  std::vector<uint8_t> begins;

 private:
  struct Named {
    uint64_t serial = 0;
    std::unique_ptr<PieceCache> pieces;
  };
  void Choose(uint64_t serial) {
    for (size_t i = 0; i < caches.size(); ++i) {
      if (caches[i].serial != serial) continue;
      current = i;
      return;
    }
    current = (current + 1) % caches.size();
    caches[current] = {serial, std::make_unique<PieceCache>()};
  }
  std::array<Named, 4> caches;
  size_t current = 0;
};

const std::string& ByteLevelCharacter(uint8_t byte) {
  // Bytes that print stand for themselves, the others for the characters from U+0100 on.
  static const std::array<std::string, 256> kCharacters = [] {
    std::array<std::string, 256> made;
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; ++b) {
      const bool prints = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xFF && b != 0xAD);
      AppendCodePoint(prints ? b : next++, &made[b]);
    }
    return made;
  }();
  return kCharacters[byte];
}

bool BytesOfByteLevel(std::string_view characters, std::string* bytes) {
  static const std::unordered_map<std::string_view, char> kBytes = [] {
    std::unordered_map<std::string_view, char> made;
    for (int b = 0; b < 256; ++b)
      made[ByteLevelCharacter(static_cast<uint8_t>(b))] = static_cast<char>(b);
    return made;
  }();
  bytes->clear();
  for (size_t at = 0; at < characters.size();) {
    const size_t begin = at;
    NextCodePoint(characters, &at);
    const auto byte = kBytes.find(characters.substr(begin, at - begin));
    if (byte == kBytes.end()) return false;
    *bytes += byte->second;
  }
  return true;
}

StatusOr<std::unique_ptr<Bpe>> Bpe::Read(const HfNode& model, bool byte_level,
                                         size_t added_tokens) {
  if (!model.json().is_object()) return model.Malformed("an object");
  if (!model["type"].is_null()) {
    SALA_ASSIGN_OR_RETURN(const std::string type, model["type"].Text());
    if (type != "BPE") return model["type"].Unsupported("BPE is");
  } else if (model["merges"].is_null()) {
    return model["type"].Unsupported("BPE is");
  }
  SALA_RETURN_IF_ERROR(model.OnlyKeys({"type", "dropout", "unk_token", "continuing_subword_prefix",
                                       "end_of_word_suffix", "fuse_unk", "byte_fallback",
                                       "ignore_merges", "vocab", "merges"}));
  if (!model["dropout"].is_null() && model["dropout"].json() != 0.0)
    return model["dropout"].Unsupported("null is: ids drawn at random cannot be repeated");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const nlohmann::json& text = model[key].json();
    if (!text.is_null() && !(text.is_string() && text.get_ref<const std::string&>().empty()))
      return model[key].Unsupported("null and \"\" are");
  }
  std::unique_ptr<Bpe> bpe(new Bpe);
  bpe->serial_ = NextSerial();
  bpe->byte_level_ = byte_level;
  SALA_ASSIGN_OR_RETURN(bpe->byte_fallback_, model["byte_fallback"].Flag(false));
  SALA_ASSIGN_OR_RETURN(bpe->fuse_unk_, model["fuse_unk"].Flag(false));
  SALA_ASSIGN_OR_RETURN(bpe->ignore_merges_, model["ignore_merges"].Flag(false));
  SALA_RETURN_IF_ERROR(bpe->ReadVocabulary(model["vocab"], added_tokens));
  SALA_RETURN_IF_ERROR(bpe->ReadMerges(model["merges"]));
  SALA_RETURN_IF_ERROR(bpe->ReadUnknown(model["unk_token"]));
  bpe->MakeSymbols();
  bpe->MakeBorders();
  return bpe;
}

Status Bpe::ReadVocabulary(const HfNode& vocab, size_t added_tokens) {
  if (!vocab.json().is_object()) return vocab.Malformed("an object of pieces and ids");
  if (vocab.json().empty()) return vocab.Malformed("at least one piece");
  int64_t largest = 0;
  for (const auto& [piece, id] : vocab.json().items()) {
    const bool fits = id.is_number_unsigned() && id.get<uint64_t>() < kMaxVocabulary;
    if (!fits) return vocab[piece].Number(kMaxVocabulary).status();
    largest = std::max(largest, id.get<int64_t>());
  }
  // Ids without a piece are rare, and each takes memory.
  const auto most = static_cast<int64_t>(4 * (vocab.json().size() + added_tokens) + 65536);
  if (largest > most) {
    return vocab.Malformed("ids up to " + std::to_string(most) + " for " +
                           std::to_string(vocab.json().size()) + " pieces, found " +
                           std::to_string(largest));
  }
  pieces_.resize(static_cast<size_t>(largest) + 1);
  std::vector<bool> used(pieces_.size(), false);
  for (const auto& [piece, id] : vocab.json().items()) {
    const auto place = id.get<size_t>();
    if (used[place]) {
      return vocab[piece].Malformed("an id of its own; \"" + Printable(pieces_[place]) +
                                    "\" has it too");
    }
    used[place] = true;
    pieces_[place] = piece;
  }
  ids_.reserve(vocab.json().size());
  for (size_t id = 0; id < pieces_.size(); ++id) {
    if (used[id]) ids_.emplace(pieces_[id], static_cast<int32_t>(id));
  }
  return OkStatus();
}

Status Bpe::ReadMerges(const HfNode& merges) {
  SALA_ASSIGN_OR_RETURN(const std::vector<HfNode> list, merges.List());
  merges_.reserve(list.size());
  for (const HfNode& merge : list) {
    std::string left, right;
    if (merge.json().is_string()) {
      const std::string& both = merge.json().get_ref<const std::string&>();
      if (both.starts_with("#version")) continue;
      const size_t space = both.find(' ');
      if (space == std::string::npos || both.find(' ', space + 1) != std::string::npos)
        return merge.Malformed("two pieces with one space between");
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else if (merge.json().is_array() && merge.json().size() == 2 && merge.json()[0].is_string() &&
               merge.json()[1].is_string()) {
      left = merge.json()[0].get<std::string>();
      right = merge.json()[1].get<std::string>();
    } else {
      return merge.Malformed("two pieces");
    }
    const std::string joined = left + right;
    const Merge read{Find(left), Find(right), Find(joined)};
    const std::array<std::pair<int32_t, const std::string*>, 3> pieces = {
        {{read.left, &left}, {read.right, &right}, {read.id, &joined}}};
    for (const auto& [id, text] : pieces) {
      if (id < 0)
        return merge.Malformed("pieces of the vocabulary; \"" + Printable(*text) + "\" is none");
    }
    if (left.empty() || right.empty()) return merge.Malformed("two pieces that are not empty");
    merges_.push_back(read);
  }
  table_ = std::make_unique<PairTable>(merges_.size());
  for (size_t rank = 0; rank < merges_.size(); ++rank) {
    const Merge& merge = merges_[rank];
    table_->Set(merge.left, merge.right, {static_cast<int32_t>(rank), merge.id});
  }
  return OkStatus();
}

Status Bpe::ReadUnknown(const HfNode& unk_token) {
  if (unk_token.is_null()) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::string text, unk_token.Text());
  unk_ = Find(text);
  return unk_ >= 0 ? OkStatus() : unk_token.Malformed("a piece of the vocabulary");
}

void Bpe::MakeSymbols() {
  for (int b = 0; b < 256; ++b) {
    const auto at = static_cast<size_t>(b);
    fallback_[at] = byte_fallback_ ? Find(FallbackName(b)) : -1;
    bytes_[at] = Find(ByteLevelCharacter(static_cast<uint8_t>(b)));
  }
  bmp_symbols_.assign(kBmp, -1);
  for (const auto& [piece, id] : ids_) {
    if (piece.empty()) continue;
    size_t end = 0;
    const uint32_t c = NextCodePoint(piece, &end);
    if (end != piece.size()) continue;
    if (c < kBmp) {
      bmp_symbols_[c] = id;
    } else {
      other_symbols_[c] = id;
    }
  }
}

int32_t Bpe::SymbolOf(uint32_t code_point) const {
  if (code_point < kBmp) return bmp_symbols_[code_point];
  const auto found = other_symbols_.find(code_point);
  return found == other_symbols_.end() ? -1 : found->second;
}

// Which symbols a piece may begin and end with: itself where it is a symbol, and those of the
// pieces it is joined from. Joined pieces are longer than their parts, so going through the merges
// by length sees the parts first.
void Bpe::MakeBorders() {
  if (byte_level_) return;
  std::vector<std::vector<int32_t>> first(pieces_.size()), last(pieces_.size());
  const auto add = [](std::vector<int32_t>& set, int32_t id) {
    if (std::find(set.begin(), set.end(), id) == set.end()) set.push_back(id);
  };
  const auto add_symbol = [&](int32_t id) {
    if (id < 0) return;
    add(first[static_cast<size_t>(id)], id);
    add(last[static_cast<size_t>(id)], id);
  };
  for (const int32_t id : bmp_symbols_) add_symbol(id);
  for (const auto& [c, id] : other_symbols_) add_symbol(id);
  for (const int32_t id : fallback_) add_symbol(id);
  add_symbol(unk_);
  std::vector<Merge> by_length = merges_;
  std::stable_sort(by_length.begin(), by_length.end(), [this](const Merge& a, const Merge& b) {
    return piece(a.id).size() < piece(b.id).size();
  });
  size_t pairs = 0;
  for (const Merge& merge : by_length) {
    const auto& begins = first[static_cast<size_t>(merge.left)];
    const auto& ends = last[static_cast<size_t>(merge.right)];
    for (const int32_t id : begins) add(first[static_cast<size_t>(merge.id)], id);
    for (const int32_t id : ends) add(last[static_cast<size_t>(merge.id)], id);
    pairs += last[static_cast<size_t>(merge.left)].size() *
             first[static_cast<size_t>(merge.right)].size();
  }
  borders_ = std::make_unique<PairTable>(pairs);
  for (const Merge& merge : merges_) {
    for (const int32_t left : last[static_cast<size_t>(merge.left)]) {
      for (const int32_t right : first[static_cast<size_t>(merge.right)])
        borders_->Set(left, right, {});
    }
  }
}

int32_t Bpe::Find(std::string_view piece) const {
  const auto found = ids_.find(piece);
  return found == ids_.end() ? -1 : found->second;
}

void Bpe::Describe(const std::function<void(const std::string&)>& line) const {
  const auto escaped = [](const std::string& piece) { return DumpJson(nlohmann::json(piece)); };
  for (int32_t id = 0; id < size(); ++id) {
    const std::string& text = piece(id);
    if (Find(text) == id) line(std::to_string(id) + "\t" + escaped(text) + "\n");
  }
  for (const Merge& merge : merges_)
    line(escaped(piece(merge.left)) + escaped(piece(merge.right)) + "\n");
  line("unk " + std::to_string(unk_) + " byte_fallback " + std::to_string(byte_fallback_) +
       " fuse_unk " + std::to_string(fuse_unk_) + " ignore_merges " +
       std::to_string(ignore_merges_) + "\n");
}

void Bpe::Encode(std::string_view piece, const Output& out) const {
  Space& space = Space::OfThread(serial_);
  if (byte_level_) return EncodeWord(piece, 0, space, out);
  if (ignore_merges_) {
    if (const int32_t id = Find(piece); id >= 0) {
      out.ids->push_back(id);
      if (out.begins != nullptr) out.begins->push_back(0);
      return;
    }
  }
  EncodeCut(piece, space, out);
}

// Cuts between two characters whose symbols are the border of no merge. An unk token is held back
// until a character of the vocabulary comes (MergeWord), so there is no cut while one is held; a
// character that is dropped leaves its neighbours adjacent.
void Bpe::EncodeCut(std::string_view piece, Space& space, const Output& out) const {
  size_t begin = 0;
  int32_t left = -1;  // the last symbol so far
  bool unk_held = false;
  for (size_t at = 0; at < piece.size();) {
    const size_t border = at;
    int32_t symbol = SymbolOf(NextCodePoint(piece, &at));
    int32_t last = symbol;
    const bool known = symbol >= 0;
    if (!known) {
      if (!FallsBack(piece.substr(border, at - border))) {
        unk_held = unk_held || unk_ >= 0;
        continue;
      }
      symbol = fallback_[static_cast<uint8_t>(piece[border])];
      last = fallback_[static_cast<uint8_t>(piece[at - 1])];
    }
    if (left >= 0 && !unk_held && borders_->Find(left, symbol) == nullptr) {
      EncodeWord(piece.substr(begin, border - begin), begin, space, out);
      begin = border;
    }
    if (known) unk_held = false;
    left = last;
  }
  EncodeWord(piece.substr(begin), begin, space, out);
}

bool Bpe::FallsBack(std::string_view character) const {
  return std::all_of(character.begin(), character.end(),
                     [&](char b) { return fallback_[static_cast<uint8_t>(b)] >= 0; });
}

void Bpe::EncodeWord(std::string_view word, size_t begin, Space& space, const Output& out) const {
  const bool kept = word.size() <= PieceCache::kMaxPieceBytes;
  uint64_t hash = 0;
  if (kept) {
    hash = Xxh3(word);
    PieceCache::Entry entry;
    if (space.cache().Find(word, hash, &entry)) {
      const size_t old = out.ids->size();
      out.ids->resize(old + entry.tokens);
      if (entry.tokens > 0)
        std::memcpy(out.ids->data() + old, entry.ids, entry.tokens * sizeof(int32_t));
      if (out.begins == nullptr) return;
      for (size_t i = 0; i < entry.tokens; ++i)
        out.begins->push_back(static_cast<uint32_t>(begin + static_cast<uint8_t>(entry.begins[i])));
      return;
    }
  }
  MergeWord(word, space);
  space.ids.clear();
  space.begins.clear();
  for (uint32_t at = space.symbols.empty() ? kNone : 0; at != kNone; at = space.symbols[at].next) {
    const Symbol& symbol = space.symbols[at];
    out.ids->push_back(symbol.id);
    if (out.begins != nullptr) out.begins->push_back(static_cast<uint32_t>(begin + symbol.begin));
    if (!kept) continue;
    space.ids.push_back(symbol.id);
    space.begins.push_back(static_cast<uint8_t>(symbol.begin));
  }
  if (kept && space.ids.size() <= PieceCache::kMaxTokens)
    space.cache().Add(word, hash, space.ids.data(), space.begins.data(), space.ids.size());
  // One huge word must not hold memory for the life of the thread.
  constexpr size_t kKeptSymbols = size_t{1} << 20;
  if (space.symbols.capacity() > kKeptSymbols) {
    space.symbols = {};
    space.heap = {};
  }
}

void Bpe::MergeWord(std::string_view word, Space& space) const {
  std::vector<Symbol>& symbols = space.symbols;
  symbols.clear();
  const auto add = [&](int32_t id, size_t begin) {
    const auto at = static_cast<uint32_t>(symbols.size());
    symbols.push_back({id, static_cast<uint32_t>(begin), at - 1, at + 1});
  };
  if (byte_level_ && ignore_merges_) {
    std::string characters;
    for (const char b : word) characters += ByteLevelCharacter(static_cast<uint8_t>(b));
    if (const int32_t id = Find(characters); id >= 0) {
      symbols.push_back({id, 0, kNone, kNone});
      return;
    }
  }
  // An unk token is held back: more may be fused with it. Bytes go in before it.
  bool unk_held = false;
  size_t unk_begin = 0;
  const auto unknown = [&](std::string_view character, size_t begin) {
    if (FallsBack(character)) {
      // The bytes of ByteLevel's spelling of one byte all start at that byte.
      for (size_t i = 0; i < character.size(); ++i)
        add(fallback_[static_cast<uint8_t>(character[i])], byte_level_ ? begin : begin + i);
      unk_begin = symbols.back().begin;  // places do not fall
      return;
    }
    if (unk_ < 0) return;
    if (unk_held && fuse_unk_) return;
    if (unk_held) add(unk_, unk_begin);
    unk_held = true;
    unk_begin = begin;
  };
  const auto known = [&](int32_t id, size_t begin) {
    if (unk_held) add(unk_, unk_begin);
    unk_held = false;
    add(id, begin);
  };
  for (size_t at = 0; at < word.size();) {
    const size_t begin = at;
    if (byte_level_) {
      const auto byte = static_cast<uint8_t>(word[at++]);
      if (bytes_[byte] >= 0) {
        known(bytes_[byte], begin);
      } else {
        unknown(ByteLevelCharacter(byte), begin);
      }
      continue;
    }
    const int32_t id = SymbolOf(NextCodePoint(word, &at));
    if (id >= 0) {
      known(id, begin);
    } else {
      unknown(word.substr(begin, at - begin), begin);
    }
  }
  if (unk_held) add(unk_, unk_begin);
  if (symbols.empty()) return;
  symbols.back().next = kNone;  // the first one's previous is 0 - 1, which is kNone

  std::vector<Candidate>& heap = space.heap;
  heap.clear();
  const auto consider = [&](uint32_t left, uint32_t right, bool sift) {
    const PairTable::Value* merge = table_->Find(symbols[left].id, symbols[right].id);
    if (merge == nullptr) return;
    heap.push_back({(static_cast<uint64_t>(merge->rank) << 32) | left, merge->id});
    if (sift) std::push_heap(heap.begin(), heap.end());
  };
  for (uint32_t i = 0; i + 1 < symbols.size(); ++i) consider(i, i + 1, false);
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Candidate best = heap.back();
    heap.pop_back();
    const auto at = static_cast<uint32_t>(best.order);
    Symbol& left = symbols[at];
    // Stale entries: the symbol is gone, or its pair is another one by now. A pair that changed is
    // longer, so it never gives the same id.
    if (left.previous == at || left.next == kNone) continue;
    const uint32_t gone = left.next;
    const PairTable::Value* merge = table_->Find(left.id, symbols[gone].id);
    if (merge == nullptr || merge->id != best.id) continue;
    left.id = best.id;
    left.next = symbols[gone].next;
    symbols[gone].previous = gone;
    if (left.next != kNone) {
      symbols[left.next].previous = at;
      consider(at, left.next, true);
    }
    if (left.previous != kNone) consider(left.previous, at, true);
  }
}

}  // namespace sala::data
