// A piece: the documents and cases of some records of one unit, in order, in one durable file
//
//   OUT/ingest.pieces/UUUUUU-NNNNNN.piece     unit U, piece N of it
//
// that says where the next piece of the unit begins. A piece counts when its checksum and its plan
// fit; what is missing or does not fit is made again. Nothing of it depends on other units: lines
// are counted from the start of the segment, and copies are left out later, when all pieces are put
// together in order.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/status.h"
#include "data/chat_record.h"
#include "data/record_encoder.h"

namespace sala::data {

// Where a unit goes on: record at `offset` of the segment's file, `lines` of the segment read.
struct UnitPosition {
  uint64_t segment = 0;
  int64_t offset = 0;
  int64_t lines = 0;
  bool operator==(const UnitPosition&) const = default;
};

struct RecordPlace {
  uint64_t segment = 0;
  int64_t line = 0;  // from the segment's start, from 1
  int64_t offset = 0;
};

enum class PieceEventKind : uint8_t {
  kOpened = 1,    // the first record of a segment or piece that passed the checks, or one of
                  // another shape than the one before
  kCase = 2,      // a case of a rule
  kDocument = 3,  // its tokens (none: a chat with nothing to learn)
};

struct PieceEvent {
  PieceEventKind kind = PieceEventKind::kCase;
  RecordPlace place;
  std::string id;
  ChatShape shape = ChatShape::kNone;  // kOpened
  std::string rule, action;            // kCase
  uint64_t hash = 0;                   // kDocument, likewise below
  int64_t tokens = 0;
};

class Piece {
 public:
  // Narrow: ids take 2 bytes.
  Piece(bool narrow, UnitPosition begin) : narrow_(narrow), begin_(begin) {}

  void AddOpened(const RecordPlace& place, ChatShape shape);
  void AddCase(const RecordPlace& place, const std::string& id, const std::string& rule,
               const std::string& action);
  // Without tokens when it teaches nothing.
  void AddDocument(const RecordPlace& place, const std::string& id, const EncodedRecord& record);
  void AddRecord() { ++records_; }
  void EndSegment(uint64_t segment, int64_t lines) { segment_lines_.emplace_back(segment, lines); }
  void End(const UnitPosition& next, bool last) {
    next_ = next;
    last_ = last;
  }

  int64_t records() const { return records_; }
  const UnitPosition& begin() const { return begin_; }
  const UnitPosition& next() const { return next_; }
  bool last() const { return last_; }  // of its unit
  // Segments that end in the piece, and their lines.
  const std::vector<std::pair<uint64_t, int64_t>>& segment_lines() const { return segment_lines_; }

  // Durably. FILE-WRITE (74).
  Status Write(const std::string& path, const std::string& plan) const;
  // Nothing when there is no such file or it is not whole or of another plan.
  static std::optional<Piece> Read(const std::string& path, const std::string& plan);

  // The events in order; tokens and mask of a document come with it.
  class Cursor {
   public:
    explicit Cursor(const Piece& piece);
    bool Next(PieceEvent* event);
    // Of the document last given.
    void CopyTokens(std::vector<int32_t>* tokens, std::vector<uint8_t>* mask);

   private:
    const Piece& piece_;
    std::string_view events_;
    size_t token_ = 0, mask_ = 0;  // of the next document, in ids
    int64_t last_tokens_ = 0;
    bool last_masked_ = false;
  };

 private:
  bool narrow_;
  UnitPosition begin_, next_;
  bool last_ = false;
  int64_t records_ = 0;
  std::vector<std::pair<uint64_t, int64_t>> segment_lines_;
  std::string events_;
  std::string tokens_;  // ids of 2 or 4 bytes
  std::string mask_;    // a byte for each token of chats
};

std::string PiecePath(const std::string& directory, uint64_t unit, int64_t number);

}  // namespace sala::data
