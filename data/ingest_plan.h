// What an ingest will read, cut into units that workers take: a pure function of the inputs and
// the options, never of the number of workers.
//
// The cut: files in order; a plain file of JSON lines in segments of piece_bytes; other files
// whole; small neighbours together in one unit. A unit's documents are written in pieces of about
// piece_bytes of text, which is what a killed ingest has to do again at most, for each worker.
//
// OUT/ingest.pieces/plan.json holds options and inputs; an ingest goes on only where both are as
// they were. Errors: ING-INPUT (66), ING-FORMAT (65), ING-UNFINISHED (74), ING-CHANGED (78).
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/chat_renderer.h"
#include "data/ingest.h"
#include "data/record_reader.h"

namespace sala::data {

struct PlannedFile {
  std::string path;
  FileKind kind;
  size_t source = 0;  // in IngestOptions::sources
  int64_t bytes = 0;  // on disk
  int64_t modified_ns = 0;
};

struct IngestSegment {
  size_t file = 0;
  int64_t begin = 0;
  int64_t end = -1;   // -1: to the end of the file
  int64_t bytes = 0;  // on disk
};

// Segments [begin, end).
struct Unit {
  size_t begin = 0, end = 0;
};

struct IngestPlan {
  std::vector<PlannedFile> files;
  std::vector<IngestSegment> segments;
  std::vector<Unit> units;
  std::vector<std::string> passed_over;  // as in InputFiles, of all sources
  std::string text;                      // of plan.json
  std::string fingerprint;               // of that text
};

StatusOr<IngestPlan> MakeIngestPlan(const IngestOptions& options, const Tokenizer& tokenizer,
                                    const ChatRenderer& chats);

std::string PiecesDirectory(const std::string& output);

// Makes the directory of pieces and writes plan.json, or checks the one that is there.
Status OpenPieces(const IngestOptions& options, const IngestPlan& plan);

// ING-CHANGED when a file is no longer as it was planned.
Status CheckUnchanged(const IngestPlan& plan);

// What the data depends on, by name.
nlohmann::json OptionsJson(const IngestOptions& options, const Tokenizer& tokenizer,
                           const ChatRenderer& chats);
std::string NameOfRule(RecordRule rule);

}  // namespace sala::data
