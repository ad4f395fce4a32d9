// Text and chat files -> a token store.
//
//   IngestOptions options{.sources = {{.name = "books", .license = "CC0-1.0", .inputs =
//   {"books/"}}},
//                         .output = "corpora/books", .name = "books"};
//   SALA_ASSIGN_OR_RETURN(IngestReport report, RunIngest(options, *tokenizer));
//
// Read: .txt (one document a file, or cut at blank lines or at separator lines), .jsonl and .ndjson
// (one record a line: a text field, or a chat in one of the shapes of data/chat_record.h, all
// records of a file in one). Directories are walked in sorted order. A dataset holds text or chat,
// never both; the first record decides. Lines are read one by one, so a file may be larger than
// memory; a .txt that is one document may not.
//
// Every record is checked in this order, each with a rule [default]: not JSON, not an object, field
// missing, wrong type, invalid UTF-8 [error]; lone surrogate escape [skip]; NUL [fix: dropped];
// chat role or template [error]; no text [skip]; duplicate (dedup: exact) [skip]; nothing to learn
// (chat) [skip]. `fix` exists for UTF-8 (U+FFFD), surrogates (U+FFFD) and NUL. Each case goes to
// ingest.log.jsonl {file, line, offset, id, rule, action}.
//
// Errors (65): ING-JSON, ING-FIELD, ING-UTF8, ING-NUL, ING-EMPTY, ING-DUP, ING-FORMAT,
// ING-MODALITY, ING-REJECTS, ING-KIND, ING-SHAPE, CHAT-ROLE, CHAT-TEMPLATE, CHAT-PREFIX,
// CHAT-NOMASK; CHAT-HELPER (74); ING-INPUT (66): an input does not exist; ING-RULE (78): a rule
// that cannot be.
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
enum class TextSplit { kWholeFile, kBlankLines, kSeparator };

struct IngestSource {
  std::string name = {}, license = {}, note = {};
  std::vector<std::string> inputs = {};  // files and directories
};

struct IngestOptions {
  std::vector<IngestSource> sources = {};
  std::string output = {};
  std::string name = {};
  std::vector<std::string> extensions = {".txt", ".jsonl",
                                         ".ndjson"};  // of files found in directories
  std::string text_field = "text";                    // dotted path
  std::string messages_field = "messages";
  std::string id_field = "id";
  TextSplit split = TextSplit::kWholeFile;
  std::string separator = {};  // a line that is exactly this
  bool dedup = false;
  // By rule name: not_json, not_object, field_missing, wrong_type, invalid_utf8, lone_surrogate,
  // nul, chat, empty, duplicate, empty_target.
  std::map<std::string, RecordRule> rules = {};
  std::optional<int64_t> max_rejects =
      {};  // malformed records skipped; default: a thousandth of the records
  std::string chat_template = "chatml";  // as data/chat_renderer.h has it
  std::string tokenizer_path = {};       // where a template may be
  ChatMask chat_mask = ChatMask::kAllAssistant;
  bool add_bos = true;  // where the tokenizer has one; likewise eos
  bool add_eos = true;
  int64_t shard_tokens = int64_t{256} << 20;
};

struct IngestReport {
  DatasetInfo info;
  int64_t records = 0;
  std::map<std::string, int64_t> cases;  // by rule name
};

StatusOr<IngestReport> RunIngest(const IngestOptions& options, const Tokenizer& tokenizer);

// The files named by inputs: files as they are, directories walked in sorted order for the
// extensions. ING-INPUT (66).
StatusOr<std::vector<std::string>> FindInputFiles(const std::vector<std::string>& inputs,
                                                  const std::vector<std::string>& extensions);

}  // namespace sala::data
