#include "data/ingest_piece.h"

#include <cstdio>
#include <cstring>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"

namespace sala::data {
namespace {

constexpr char kMagic[] = "sala ingest piece 1\n";

void Put(std::string* out, uint64_t value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof value);
}

void Put(std::string* out, std::string_view text) {
  Put(out, text.size());
  out->append(text);
}

// Reads what Put wrote; after a read past the end everything is empty and ok() is false.
class Parser {
 public:
  explicit Parser(std::string_view bytes) : bytes_(bytes) {}
  uint64_t Number() {
    uint64_t value = 0;
    const std::string_view raw = Bytes(sizeof value);
    if (ok_) std::memcpy(&value, raw.data(), sizeof value);
    return value;
  }
  int64_t Signed() { return static_cast<int64_t>(Number()); }
  std::string_view Text() { return Bytes(Number()); }
  std::string_view Bytes(uint64_t count) {
    ok_ = ok_ && count <= bytes_.size();
    if (!ok_) return {};
    const std::string_view out = bytes_.substr(0, count);
    bytes_.remove_prefix(count);
    return out;
  }
  bool ok() const { return ok_; }
  std::string_view rest() const { return bytes_; }

 private:
  std::string_view bytes_;
  bool ok_ = true;
};

void PutPosition(std::string* out, const UnitPosition& position) {
  Put(out, position.segment);
  Put(out, static_cast<uint64_t>(position.offset));
  Put(out, static_cast<uint64_t>(position.lines));
}

UnitPosition Position(Parser& parser) {
  UnitPosition position;
  position.segment = parser.Number();
  position.offset = parser.Signed();
  position.lines = parser.Signed();
  return position;
}

void PutEvent(std::string* out, PieceEventKind kind, const RecordPlace& place) {
  out->push_back(static_cast<char>(kind));
  Put(out, place.segment);
  Put(out, static_cast<uint64_t>(place.line));
  Put(out, static_cast<uint64_t>(place.offset));
}

}  // namespace

void Piece::AddOpened(const RecordPlace& place, ChatShape shape) {
  PutEvent(&events_, PieceEventKind::kOpened, place);
  Put(&events_, static_cast<uint64_t>(shape));
}

void Piece::AddCase(const RecordPlace& place, const std::string& id, const std::string& rule,
                    const std::string& action) {
  PutEvent(&events_, PieceEventKind::kCase, place);
  Put(&events_, id);
  Put(&events_, rule);
  Put(&events_, action);
}

void Piece::AddDocument(const RecordPlace& place, const std::string& id,
                        const EncodedRecord& record) {
  const size_t count = record.learned ? record.tokens.size() : 0;
  const bool masked = count > 0 && !record.mask.empty();
  PutEvent(&events_, PieceEventKind::kDocument, place);
  Put(&events_, id);
  Put(&events_, record.hash);
  Put(&events_, count);
  Put(&events_, masked ? 1 : 0);
  const size_t at = tokens_.size();
  if (narrow_) {
    tokens_.resize(at + count * 2);
    char* to = tokens_.data() + at;
    for (size_t i = 0; i < count; ++i) {
      const auto id16 = static_cast<uint16_t>(record.tokens[i]);
      std::memcpy(to + 2 * i, &id16, 2);
    }
  } else {
    tokens_.resize(at + count * 4);
    if (count > 0) std::memcpy(tokens_.data() + at, record.tokens.data(), count * 4);
  }
  if (masked) mask_.append(reinterpret_cast<const char*>(record.mask.data()), count);
}

Status Piece::Write(const std::string& path, const std::string& plan) const {
  std::string bytes = kMagic;
  bytes.reserve(events_.size() + tokens_.size() + mask_.size() + 4096);
  Put(&bytes, plan);
  Put(&bytes, narrow_ ? 1 : 0);
  PutPosition(&bytes, begin_);
  PutPosition(&bytes, next_);
  Put(&bytes, last_ ? 1 : 0);
  Put(&bytes, static_cast<uint64_t>(records_));
  Put(&bytes, segment_lines_.size());
  for (const auto& [segment, lines] : segment_lines_) {
    Put(&bytes, segment);
    Put(&bytes, static_cast<uint64_t>(lines));
  }
  Put(&bytes, events_);
  Put(&bytes, tokens_);
  Put(&bytes, mask_);
  Put(&bytes, Crc32c(bytes.data(), bytes.size()));
  return WriteFileAtomically(path, bytes);
}

std::optional<Piece> Piece::Read(const std::string& path, const std::string& plan) {
  if (!PathExists(path)) return std::nullopt;
  const auto bytes = ReadFile(path);
  if (!bytes.ok() || bytes->size() < sizeof(uint64_t)) return std::nullopt;
  const std::string_view content(bytes->data(), bytes->size() - sizeof(uint64_t));
  Parser tail(std::string_view(*bytes).substr(content.size()));
  if (tail.Number() != Crc32c(content.data(), content.size())) return std::nullopt;
  Parser parser(content);
  if (parser.Bytes(sizeof kMagic - 1) != kMagic || parser.Text() != plan) return std::nullopt;
  const bool narrow = parser.Number() != 0;
  Piece piece(narrow, Position(parser));
  piece.next_ = Position(parser);
  piece.last_ = parser.Number() != 0;
  piece.records_ = parser.Signed();
  for (uint64_t left = parser.Number(); left > 0 && parser.ok(); --left) {
    const uint64_t segment = parser.Number();
    piece.segment_lines_.emplace_back(segment, parser.Signed());
  }
  piece.events_ = parser.Text();
  piece.tokens_ = parser.Text();
  piece.mask_ = parser.Text();
  if (!parser.ok() || !parser.rest().empty()) return std::nullopt;
  return piece;
}

Piece::Cursor::Cursor(const Piece& piece) : piece_(piece), events_(piece.events_) {}

bool Piece::Cursor::Next(PieceEvent* event) {
  if (events_.empty()) return false;
  token_ += static_cast<size_t>(last_tokens_);
  mask_ += last_masked_ ? static_cast<size_t>(last_tokens_) : 0;
  last_tokens_ = 0;
  Parser parser(events_);
  event->kind = static_cast<PieceEventKind>(parser.Bytes(1)[0]);
  event->place.segment = parser.Number();
  event->place.line = parser.Signed();
  event->place.offset = parser.Signed();
  if (event->kind == PieceEventKind::kOpened) {
    event->shape = static_cast<ChatShape>(parser.Number());
  } else {
    event->id = parser.Text();
  }
  if (event->kind == PieceEventKind::kCase) {
    event->rule = parser.Text();
    event->action = parser.Text();
  } else if (event->kind == PieceEventKind::kDocument) {
    event->hash = parser.Number();
    event->tokens = last_tokens_ = parser.Signed();
    last_masked_ = parser.Number() != 0;
  }
  SALA_CHECK(parser.ok()) << "a piece with a good checksum has half an event";
  events_ = parser.rest();
  return true;
}

void Piece::Cursor::CopyTokens(std::vector<int32_t>* tokens, std::vector<uint8_t>* mask) {
  const auto count = static_cast<size_t>(last_tokens_);
  tokens->resize(count);
  if (piece_.narrow_) {
    const char* from = piece_.tokens_.data() + token_ * 2;
    for (size_t i = 0; i < count; ++i) {
      uint16_t id = 0;
      std::memcpy(&id, from + 2 * i, 2);
      (*tokens)[i] = id;
    }
  } else if (count > 0) {
    std::memcpy(tokens->data(), piece_.tokens_.data() + token_ * 4, count * 4);
  }
  mask->clear();
  if (last_masked_) {
    const auto* from = reinterpret_cast<const uint8_t*>(piece_.mask_.data()) + mask_;
    mask->assign(from, from + count);
  }
}

std::string PiecePath(const std::string& directory, uint64_t unit, int64_t number) {
  char name[64];
  std::snprintf(name, sizeof name, "/%06llu-%06lld.piece", static_cast<unsigned long long>(unit),
                static_cast<long long>(number));
  return directory + name;
}

}  // namespace sala::data
