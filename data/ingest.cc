// The last step of an ingest: the pieces of all units, in order, become files, log and counts.
#include "data/ingest.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <unordered_set>
#include <utility>

#include "core/clock.h"
#include "core/file.h"
#include "core/json.h"
#include "core/progress.h"
#include "core/run_lock.h"
#include "data/ingest_piece.h"
#include "data/ingest_plan.h"
#include "data/ingest_workers.h"
#include "data/record_check.h"
#include "data/record_encoder.h"

namespace sala::data {
namespace {

using nlohmann::json;

// A source all of whose first records teach nothing is a template that does not match the data.
constexpr int64_t kNoMaskRecords = 100;

bool IsName(const std::string& name) {
  const auto letter = [](char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
  };
  if (name.empty() || name.size() > 64 || !letter(name[0])) return false;
  return std::all_of(name.begin(), name.end(),
                     [&](char c) { return letter(c) || c == '_' || c == '.' || c == '-'; });
}

Status Exists(const std::string& output) {
  return MakeError(ExitCode::kIo, "DS-EXISTS",
                   output + ": there is a dataset already; choose another output or remove it");
}

// Files of an ingest that did not end belong to no dataset.
Status RemoveShards(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(directory));
  for (const std::string& name : names) {
    if (name.rfind("tokens-", 0) == 0 && name.find(".h5") != std::string::npos)
      SALA_RETURN_IF_ERROR(RemoveTree(directory + "/" + name));
  }
  return OkStatus();
}

class Ingest {
 public:
  Ingest(const IngestOptions& options, const Tokenizer& tokenizer, RecordChecker checker,
         RecordEncoder encoder)
      : options_(options),
        tokenizer_(tokenizer),
        checker_(std::move(checker)),
        encoder_(std::move(encoder)) {}

  StatusOr<IngestReport> Run();

 private:
  Status Merge();
  Status TakePiece(const Piece& piece);
  Status TakeEvent(const PieceEvent& event, Piece::Cursor& cursor);
  Status EnterSegment(uint64_t segment);
  Status EndSource();
  Status Open(const PieceEvent& event);
  Status AddDocument(const PieceEvent& event, Piece::Cursor& cursor);
  Status NothingToLearn(const PieceEvent& event);
  Status Note(const std::string& rule, const std::string& action, const PieceEvent& event);
  Status CheckRejects(bool end) const;
  std::string Where(const PieceEvent& event) const;
  void ShowProgress();
  json IngestJson(const std::vector<std::string>& hashes) const;
  const PlannedFile& FileOf(uint64_t segment) const {
    return plan_.files[plan_.segments[segment].file];
  }

  const IngestOptions& options_;
  const Tokenizer& tokenizer_;
  RecordChecker checker_;
  RecordEncoder encoder_;
  IngestPlan plan_;
  std::unique_ptr<IngestWorkers> workers_;
  std::unique_ptr<ProgressDisplay> progress_;
  double begin_seconds_ = 0;

  std::unique_ptr<TokenStoreWriter> writer_;  // opened by the first record, which decides the kind
  bool chat_ = false;
  std::ofstream log_;
  std::unordered_set<uint64_t> seen_;
  uint64_t segment_ = 0;
  int64_t lines_before_ = 0;  // the segment, in its file
  bool entered_ = false;
  std::optional<ChatShape> file_shape_;  // of the first record of the current file
  std::vector<int64_t> segment_lines_;
  size_t source_ = 0;
  int64_t source_index_ = -1;                      // in the writer
  int64_t source_chats_ = 0, source_learned_ = 0;  // of the current source
  int64_t rejects_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<uint8_t> mask_;
  IngestReport report_;
};

StatusOr<IngestReport> Ingest::Run() {
  const std::string pieces = PiecesDirectory(options_.output);
  SALA_ASSIGN_OR_RETURN(plan_, MakeIngestPlan(options_, tokenizer_, encoder_.chats()));
  report_.passed_over = plan_.passed_over;
  if (PathExists(options_.output + "/dataset.json")) {
    if (!options_.resume || !PathExists(pieces)) return Exists(options_.output);
    // Killed between the commit and its last step.
    SALA_RETURN_IF_ERROR(OpenPieces(options_, plan_));
    SALA_ASSIGN_OR_RETURN(report_.info, ReadDatasetInfo(options_.output));
    report_.records = report_.info.ingest.value("records", int64_t{0});
    report_.cases = report_.info.ingest.value("cases", std::map<std::string, int64_t>());
    SALA_RETURN_IF_ERROR(RemoveTree(pieces));
    return report_;
  }
  SALA_RETURN_IF_ERROR(MakeDirectories(options_.output));
  SALA_RETURN_IF_ERROR(OpenPieces(options_, plan_));
  SALA_ASSIGN_OR_RETURN(const RunLock lock, RunLock::Acquire(pieces));
  SALA_RETURN_IF_ERROR(RemoveShards(options_.output));
  const Status merged = Merge();
  if (merged.ok()) {
    SALA_RETURN_IF_ERROR(RemoveTree(pieces));
    return report_;
  }
  // Pieces help after a full disk or a higher limit of rejects. After a mistake of the inputs
  // either they or the options have to change, and then these pieces are of no use.
  workers_.reset();
  const ExitCode code = ExitCodeOf(merged);
  const bool again =
      code == ExitCode::kIo || code == ExitCode::kInternal || ErrorCodeOf(merged) == "ING-REJECTS";
  RemoveShards(options_.output).IgnoreError();
  if (!again) RemoveTree(pieces).IgnoreError();
  return merged;
}

void Ingest::ShowProgress() {
  if (progress_ == nullptr) return;
  constexpr int64_t kMega = 1'000'000;
  const int64_t done = workers_->bytes_done() / kMega;
  const double seconds = ClockSeconds() - begin_seconds_;
  const double rate = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  progress_->Update(done, "MB  " + std::to_string(report_.records) + " records  " +
                              std::to_string(static_cast<int64_t>(rate)) + " MB/s");
}

Status Ingest::Merge() {
  log_.open(options_.output + "/ingest.log.jsonl", std::ios::binary | std::ios::trunc);
  segment_lines_.assign(plan_.segments.size(), 0);
  begin_seconds_ = ClockSeconds();
  if (options_.progress && ::isatty(STDERR_FILENO) == 1) {
    int64_t bytes = 0;
    for (const PlannedFile& file : plan_.files) bytes += file.bytes;
    progress_ = std::make_unique<ProgressDisplay>("ingest", bytes / 1'000'000, true);
  }
  workers_ = std::make_unique<IngestWorkers>(options_, tokenizer_, plan_, encoder_);
  workers_->Start();
  const auto on_wait = [this] { ShowProgress(); };
  for (size_t unit = 0; unit < plan_.units.size(); ++unit) {
    for (int64_t number = 0;; ++number) {
      std::optional<Piece> piece;
      Status failure;
      SALA_ASSIGN_OR_RETURN(const bool more,
                            workers_->NextPiece(unit, number, &piece, &failure, on_wait));
      if (piece.has_value()) SALA_RETURN_IF_ERROR(TakePiece(*piece));
      SALA_RETURN_IF_ERROR(failure);
      if (!more) break;
      ShowProgress();
    }
  }
  SALA_RETURN_IF_ERROR(EndSource());
  if (writer_ == nullptr || writer_->documents() == 0) {
    std::string reasons;
    for (const auto& [rule, count] : report_.cases)
      reasons += (reasons.empty() ? "" : ", ") + rule + " " + std::to_string(count);
    return MakeError(ExitCode::kData, "ING-EMPTY",
                     "no document came out of " + std::to_string(report_.records) + " records of " +
                         std::to_string(plan_.files.size()) + " files" +
                         (reasons.empty() ? "" : " (" + reasons + ")") +
                         "; give files with text (from directories .txt, .jsonl and .ndjson are "
                         "taken, also packed; .json only by name)");
  }
  SALA_RETURN_IF_ERROR(CheckRejects(/*end=*/true));
  log_.flush();
  if (!log_)
    return MakeError(ExitCode::kIo, "FILE-WRITE",
                     options_.output + "/ingest.log.jsonl: cannot be written");
  SALA_RETURN_IF_ERROR(FsyncFile(options_.output + "/ingest.log.jsonl"));
  SALA_ASSIGN_OR_RETURN(const auto hashes, workers_->InputHashes(on_wait));
  SALA_RETURN_IF_ERROR(CheckUnchanged(plan_));
  SALA_ASSIGN_OR_RETURN(report_.info, writer_->Finish(IngestJson(hashes)));
  ShowProgress();
  progress_.reset();
  return OkStatus();
}

Status Ingest::TakePiece(const Piece& piece) {
  report_.records += piece.records();
  for (const auto& [segment, lines] : piece.segment_lines()) segment_lines_[segment] = lines;
  Piece::Cursor cursor(piece);
  PieceEvent event;
  while (cursor.Next(&event)) {
    SALA_RETURN_IF_ERROR(EnterSegment(event.place.segment));
    SALA_RETURN_IF_ERROR(TakeEvent(event, cursor));
  }
  return OkStatus();
}

Status Ingest::EnterSegment(uint64_t segment) {
  if (entered_ && segment == segment_) return OkStatus();
  const size_t source = FileOf(segment).source;
  if (entered_ && source != source_) SALA_RETURN_IF_ERROR(EndSource());
  // Segments without an event are passed too.
  for (uint64_t s = entered_ ? segment_ + 1 : 0; s <= segment; ++s)
    lines_before_ = plan_.segments[s].begin == 0 ? 0 : lines_before_ + segment_lines_[s - 1];
  if (!entered_ || source != source_) {
    source_ = source;
    source_index_ = -1;
    source_chats_ = source_learned_ = 0;
  }
  if (!entered_ || plan_.segments[segment].file != plan_.segments[segment_].file)
    file_shape_.reset();
  entered_ = true;
  segment_ = segment;
  return OkStatus();
}

Status Ingest::EndSource() {
  if (source_chats_ == 0 || source_learned_ > 0) return OkStatus();
  return MakeError(ExitCode::kData, "CHAT-NOMASK",
                   "source " + options_.sources[source_].name + ": none of its " +
                       std::to_string(source_chats_) +
                       " records has a token to learn; is there an assistant message "
                       "that is not switched off?");
}

std::string Ingest::Where(const PieceEvent& event) const {
  return Place(FileOf(event.place.segment).path, event.place.line + lines_before_,
               event.place.offset);
}

Status Ingest::Note(const std::string& rule, const std::string& action, const PieceEvent& event) {
  const json line = {{"file", FileOf(event.place.segment).path},
                     {"line", event.place.line + lines_before_},
                     {"offset", event.place.offset},
                     {"id", event.id},
                     {"rule", rule},
                     {"action", action}};
  log_ << DumpJson(line) << '\n';
  ++report_.cases[rule];
  // Doubles and empty records are what skipping is for; only malformed ones speak against the
  // input.
  if (action == "skip" && rule != "empty" && rule != "duplicate" && rule != "empty_target")
    ++rejects_;
  return CheckRejects(/*end=*/false);
}

Status Ingest::CheckRejects(bool end) const {
  if (!options_.max_rejects.has_value() && !end) return OkStatus();
  const int64_t most =
      options_.max_rejects.value_or(report_.records * options_.max_rejects_ppm / 1'000'000);
  if (rejects_ <= most) return OkStatus();
  return MakeError(ExitCode::kData, "ING-REJECTS",
                   std::to_string(rejects_) + " malformed records of " +
                       std::to_string(report_.records) + " were skipped, at most " +
                       std::to_string(most) + " are allowed; see " + options_.output +
                       "/ingest.log.jsonl, then raise max_rejects and go on with --resume, or "
                       "remove the directory");
}

Status Ingest::Open(const PieceEvent& event) {
  if (!file_shape_) file_shape_ = event.shape;
  if (const Status shape = CheckShape(*file_shape_, event.shape); !shape.ok())
    return Annotate(shape, Where(event));
  const bool chat = event.shape != ChatShape::kNone;
  if (writer_ != nullptr && chat != chat_) {
    return MakeError(ExitCode::kData, "ING-KIND",
                     Where(event) + ": found a " + (chat ? "chat" : "text") + " record among " +
                         (chat_ ? "chat" : "text") + " records; make one dataset of each kind");
  }
  if (writer_ == nullptr) {
    chat_ = chat;
    SALA_ASSIGN_OR_RETURN(writer_, TokenStoreWriter::Create({.directory = options_.output,
                                                             .name = options_.name,
                                                             .sft = chat_,
                                                             .add_bos = options_.add_bos,
                                                             .add_eos = options_.add_eos,
                                                             .shard_tokens = options_.shard_tokens},
                                                            tokenizer_));
  }
  if (source_index_ < 0) {
    const IngestSource& source = options_.sources[source_];
    source_index_ = writer_->AddSource(source.name, source.license, source.note);
  }
  return OkStatus();
}

Status Ingest::TakeEvent(const PieceEvent& event, Piece::Cursor& cursor) {
  switch (event.kind) {
    case PieceEventKind::kOpened:
      return Open(event);
    case PieceEventKind::kCase:
      return Note(event.rule, event.action, event);
    case PieceEventKind::kDocument:
      return AddDocument(event, cursor);
  }
  return OkStatus();
}

Status Ingest::AddDocument(const PieceEvent& event, Piece::Cursor& cursor) {
  if (options_.dedup && seen_.count(event.hash) > 0) {
    if (checker_.RuleOf("duplicate") != RecordRule::kError) return Note("duplicate", "skip", event);
    return MakeError(
        ExitCode::kData, "ING-DUP",
        Where(event) +
            ": the text of this record came before; remove it or set the rule duplicate to skip");
  }
  source_chats_ += chat_ ? 1 : 0;
  if (event.tokens == 0) return NothingToLearn(event);
  ++source_learned_;
  // Only now: a chat that was left out for it teaches nothing makes no other one a copy.
  if (options_.dedup) seen_.insert(event.hash);
  cursor.CopyTokens(&tokens_, &mask_);
  return writer_->Add(
      {.tokens = tokens_, .loss_mask = mask_, .hash = event.hash, .source = source_index_});
}

Status Ingest::NothingToLearn(const PieceEvent& event) {
  const bool hopeless = source_learned_ == 0 && source_chats_ >= kNoMaskRecords;
  if (!hopeless && checker_.RuleOf("empty_target") != RecordRule::kError)
    return Note("empty_target", "skip", event);
  return MakeError(ExitCode::kData, "CHAT-NOMASK",
                   Where(event) +
                       (hopeless ? ": none of the first " + std::to_string(source_chats_) +
                                       " records of source " + options_.sources[source_].name +
                                       " has a token to learn"
                                 : ": the record has no token to learn") +
                       "; is there an assistant message that is not switched off?");
}

json Ingest::IngestJson(const std::vector<std::string>& hashes) const {
  const ChatRenderer& chats = encoder_.chats();
  json rules = json::object();
  for (const auto& [name, rule] : options_.rules) rules[name] = NameOfRule(rule);
  json inputs = json::array();
  for (size_t f = 0; f < plan_.files.size(); ++f) {
    const PlannedFile& file = plan_.files[f];
    inputs.push_back({{"path", file.path}, {"bytes", file.bytes}, {"sha256", hashes[f]}});
  }
  return {
      {"command", "ingest"},
      {"inputs", inputs},
      {"records", report_.records},
      {"cases", report_.cases},
      {"rules", rules},
      {"dedup", options_.dedup ? "exact" : "none"},
      {"shuffled", false},
      {"chat_template", chat_ ? json(chats.name()) : json()},
      {"chat_template_sha256", chat_ && !chats.sha256().empty() ? json(chats.sha256()) : json()}};
}

}  // namespace

Status CheckDatasetName(const std::string& what, const std::string& name) {
  if (IsName(name)) return OkStatus();
  return MakeError(ExitCode::kUsage, "ING-NAME",
                   what + " name: found \"" + Printable(name) +
                       "\", expected up to 64 letters, digits, '_', '.' and '-', starting with a "
                       "letter or digit");
}

StatusOr<IngestReport> RunIngest(const IngestOptions& options, const Tokenizer& tokenizer) {
  SALA_ASSIGN_OR_RETURN(RecordChecker checker, RecordChecker::Make(options));
  SALA_RETURN_IF_ERROR(CheckDatasetName("dataset", options.name));
  for (const IngestSource& source : options.sources)
    SALA_RETURN_IF_ERROR(CheckDatasetName("source", source.name));
  SALA_ASSIGN_OR_RETURN(RecordEncoder encoder, RecordEncoder::Make(options, tokenizer));
  return Ingest(options, tokenizer, std::move(checker), std::move(encoder)).Run();
}

}  // namespace sala::data
