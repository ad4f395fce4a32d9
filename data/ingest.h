// Text and chat files -> a token store.
//
//   IngestOptions options{.sources = {{.name = "books", .license = "CC0-1.0", .inputs =
//   {"books/"}}},
//                         .output = "corpora/books", .name = "books"};
//   SALA_ASSIGN_OR_RETURN(IngestReport report, RunIngest(options, *tokenizer));
//
// Read: .txt (one document a file, or cut at blank lines or at separator lines), .jsonl and .ndjson
// (one record a line: a text field, or a chat in one of the shapes of data/chat_record.h, all
// records of a file in one), .json (an array of records), each also with .gz or .zst. Directories
// are walked in sorted order. A dataset holds text or chat, never both; the first record decides.
// Records are read one by one, so a file may be larger than memory; a .txt that is one document may
// not.
//
// Every record is checked in this order, each with a rule [default]: lone surrogate escape [skip],
// invalid UTF-8, not JSON, not an object, field missing, wrong type [error]; NUL [fix: dropped]; no
// text [skip]; chat role or template [error]; no token [empty: skip]; duplicate (dedup: exact)
// [skip]; nothing to learn (chat) [skip]. `fix` exists for UTF-8 (U+FFFD), surrogates (U+FFFD) and
// NUL. Each case goes to ingest.log.jsonl {file, line, offset, id, rule, action}.
//
// Threads (data/ingest_workers.h) make durable pieces (data/ingest_piece.h) of units of the inputs
// (data/ingest_plan.h); one thread puts the pieces together in order, so dataset and log do not
// depend on the number of workers, and a killed ingest goes on to the same bytes.
// Tokenizer::Encode and EncodeWithOffsets are called by several threads at once.
//
// Errors (65): ING-JSON, ING-FIELD, ING-UTF8, ING-NUL, ING-EMPTY, ING-DUP, ING-FORMAT,
// ING-MODALITY, ING-REJECTS, ING-KIND, ING-SHAPE, ING-TRUNCATED, ING-CRC, ING-LONG, CHAT-ROLE,
// CHAT-TEMPLATE, CHAT-PREFIX, CHAT-NOMASK; CHAT-HELPER (74); ING-INPUT (66): an input does not
// exist; ING-RULE (78): a rule that cannot be; ING-UNFINISHED (74): the output holds an unfinished
// ingest and `resume` is off; ING-CHANGED (78): it was begun with other inputs or options.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/chat.h"
#include "data/token_store.h"
#include "data/tokenizer.h"

namespace sala::data {

enum class RecordRule { kError, kSkip, kFix };
enum class TextSplit { kWholeFile, kBlankLines, kSeparator, kLines };

struct IngestSource {
  std::string name = {}, license = {}, note = {};
  std::vector<std::string> inputs = {};  // files and directories
};

struct IngestOptions {
  std::vector<IngestSource> sources = {};
  std::string output = {};
  std::string name = {};
  // Endings of files taken from directories. Not .json: there it is as often a note as data.
  std::vector<std::string> extensions = {".txt",     ".jsonl",     ".ndjson",
                                         ".txt.gz",  ".jsonl.gz",  ".ndjson.gz",
                                         ".txt.zst", ".jsonl.zst", ".ndjson.zst"};
  std::string text_field = "text";  // dotted path
  std::string messages_field = "messages";
  std::string id_field = "id";
  TextSplit split = TextSplit::kWholeFile;
  std::string separator = {};  // a line that is exactly this
  bool dedup = false;
  // By rule name: not_json, not_object, field_missing, wrong_type, invalid_utf8, lone_surrogate,
  // nul, chat, empty, duplicate, empty_target.
  std::map<std::string, RecordRule> rules = {};
  // Malformed records that may be skipped: a number, else parts in a million of the records.
  std::optional<int64_t> max_rejects = {};
  int64_t max_rejects_ppm = 1000;
  std::string chat_template = "chatml";  // as data/chat_renderer.h has it
  std::string tokenizer_path = {};       // where a template may be
  ChatMask chat_mask = ChatMask::kAllAssistant;
  bool add_bos = true;  // where the tokenizer has one; likewise eos
  bool add_eos = true;
  int64_t shard_tokens = int64_t{256} << 20;
  int64_t piece_bytes = int64_t{16} << 20;  // of text; what a worker holds, and a kill costs it
  int workers = 0;                          // threads; 0: one for each core
  int zstd_window_log = 27;                 // largest window of .zst, as a power of two
  bool resume = false;                      // goes on with what a killed ingest left, or begins
  bool progress = false;                    // a progress line, where stderr is a terminal
};

struct IngestReport {
  DatasetInfo info;
  int64_t records = 0;
  std::map<std::string, int64_t> cases;  // by rule name
  std::vector<std::string> passed_over;  // as in InputFiles
};

StatusOr<IngestReport> RunIngest(const IngestOptions& options, const Tokenizer& tokenizer);

// ING-NAME (64) unless a dataset or source may have that name.
Status CheckDatasetName(const std::string& what, const std::string& name);

struct InputFiles {
  std::vector<std::string> read;
  std::vector<std::string> passed_over;  // files of directories with another ending, sorted
};
// The files named by inputs: files as they are, directories walked in sorted order for the
// extensions. ING-INPUT (66).
StatusOr<InputFiles> FindInputFiles(const std::vector<std::string>& inputs,
                                    const std::vector<std::string>& extensions);

// "5 files are not read: in/a.md, in/b.csv, in/c.png and 2 more (...)", with what is read; "" when
// there are none.
std::string NamePassedOver(const std::vector<std::string>& files);

}  // namespace sala::data
