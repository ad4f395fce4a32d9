#include "data/ingest_workers.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <utility>

#include "core/exception.h"
#include "core/hash.h"
#include "data/record_check.h"
#include "data/record_reader.h"

namespace sala::data {
namespace {

constexpr size_t kNever = std::numeric_limits<size_t>::max();
constexpr std::chrono::milliseconds kWait{100};

int64_t ThreadCount(int wanted) {
  if (wanted > 0) return wanted;
  return std::max(1U, std::thread::hardware_concurrency());
}

StatusOr<std::string> HashOfFile(const std::string& path, const std::atomic<bool>& stop) {
  SALA_ASSIGN_OR_RETURN(auto source, OpenByteSource(path, Archive::kNone));
  std::vector<char> buffer(size_t{1} << 20);
  Sha256 sha;
  while (!stop) {
    SALA_ASSIGN_OR_RETURN(const size_t n, source->Read(buffer.data(), buffer.size()));
    if (n == 0) break;
    sha.Update(buffer.data(), n);
  }
  return sha.HexDigest();
}

// Lines that start before `offset`; the last of them may reach behind it.
StatusOr<int64_t> CountLines(const std::string& path, int64_t offset) {
  if (offset == 0) return 0;
  SALA_ASSIGN_OR_RETURN(auto source, OpenByteSource(path, Archive::kNone));
  std::vector<char> buffer(size_t{1} << 20);
  int64_t lines = 1;
  // A newline starts a line behind it.
  for (int64_t left = offset - 1; left > 0;) {
    const size_t room = std::min(buffer.size(), static_cast<size_t>(left));
    SALA_ASSIGN_OR_RETURN(const size_t n, source->Read(buffer.data(), room));
    if (n == 0) break;
    lines += std::count(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(n), '\n');
    left -= static_cast<int64_t>(n);
  }
  return lines;
}

}  // namespace

// One unit from where its pieces end to its own end.
class IngestWorkers::UnitRun {
 public:
  UnitRun(IngestWorkers& workers, size_t number, RecordChecker checker)
      : workers_(workers),
        options_(workers.options_),
        plan_(workers.plan_),
        number_(number),
        unit_(workers.plan_.units[number]),
        checker_(std::move(checker)) {}

  // Leaves the piece that was being made when it fails.
  Status Run();
  std::optional<Piece>& piece() { return piece_; }

 private:
  bool TakeOver();  // pieces of an earlier run; true when the unit is complete
  Status RunSegment(uint64_t segment);
  Status Take(const RawRecord& raw);
  Status TakeKept(const RecordChecker::Outcome& outcome, const RecordPlace& place,
                  const RawRecord& raw);
  Status ClosePiece(const UnitPosition& next, bool last);
  // Errors name the line of the file; the reader counts from the segment's start.
  StatusOr<std::string> PlaceInFile(const RawRecord& raw) const;
  Status Placed(const Status& status, const RawRecord& raw) const;
  UnitPosition StartOf(uint64_t segment) const {
    return {segment, segment < unit_.end ? plan_.segments[segment].begin : 0, 0};
  }
  void Progress(int64_t unit_bytes) {
    workers_.bytes_done_ += unit_bytes - reported_;
    reported_ = unit_bytes;
  }

  int64_t UnitBytes() const {
    int64_t bytes = 0;
    for (size_t s = unit_.begin; s < unit_.end; ++s) bytes += plan_.segments[s].bytes;
    return bytes;
  }

  IngestWorkers& workers_;
  const IngestOptions& options_;
  const IngestPlan& plan_;
  const size_t number_;
  const Unit unit_;
  RecordChecker checker_;
  const PlannedFile* file_ = nullptr;
  uint64_t segment_ = 0;
  std::optional<ChatShape>
      opened_;  // the shape of the segment's last record that passed the checks
  UnitPosition at_;
  std::optional<Piece> piece_;
  int64_t piece_number_ = 0;
  int64_t piece_text_ = 0;  // bytes of records in it
  int64_t reported_ = 0;
  EncodedRecord encoded_;
};

Status IngestWorkers::UnitRun::Run() {
  at_ = StartOf(unit_.begin);
  if (TakeOver()) {
    Progress(UnitBytes());
    return OkStatus();
  }
  piece_.emplace(workers_.tokenizer_.vocab_size() <= 65536, at_);
  for (uint64_t s = at_.segment; s < unit_.end; ++s) {
    if (s != at_.segment) at_ = StartOf(s);
    SALA_RETURN_IF_ERROR(RunSegment(s));
    if (workers_.Stopped(number_)) return OkStatus();
  }
  Progress(
      UnitBytes());  // buffers read further than a segment, pieces of an earlier run not at all
  return ClosePiece(StartOf(unit_.end), /*last=*/true);
}

bool IngestWorkers::UnitRun::TakeOver() {
  while (true) {
    const auto piece =
        Piece::Read(PiecePath(workers_.directory_, number_, piece_number_), plan_.fingerprint);
    if (!piece.has_value() || !(piece->begin() == at_)) return false;
    at_ = piece->next();
    ++piece_number_;
    workers_.Publish(number_, [](UnitState& state) { ++state.ready; });
    if (piece->last()) return true;
  }
}

Status IngestWorkers::UnitRun::ClosePiece(const UnitPosition& next, bool last) {
  piece_->End(next, last);
  SALA_RETURN_IF_ERROR(
      piece_->Write(PiecePath(workers_.directory_, number_, piece_number_), plan_.fingerprint));
  ++piece_number_;
  piece_text_ = 0;
  piece_.emplace(workers_.tokenizer_.vocab_size() <= 65536, next);
  workers_.Publish(number_, [](UnitState& state) { ++state.ready; });
  return OkStatus();
}

Status IngestWorkers::UnitRun::RunSegment(uint64_t segment) {
  const IngestSegment& range = plan_.segments[segment];
  file_ = &plan_.files[range.file];
  segment_ = segment;
  opened_.reset();
  const bool begun = at_.offset != range.begin;
  SALA_ASSIGN_OR_RETURN(RecordReader reader,
                        RecordReader::Open({.path = file_->path,
                                            .kind = file_->kind,
                                            .split = options_.split,
                                            .separator = options_.separator,
                                            .zstd_window_log = options_.zstd_window_log,
                                            .begin = at_.offset,
                                            .end = range.end,
                                            .at_record = begun || range.begin == 0,
                                            .lines_before = at_.lines}));
  const int64_t before = reported_;
  RawRecord raw;
  while (!workers_.Stopped(number_)) {
    SALA_ASSIGN_OR_RETURN(const bool more, reader.Next(&raw));
    Progress(before + reader.file_bytes_read());
    if (!more) break;
    piece_->AddRecord();
    SALA_RETURN_IF_ERROR(Take(raw));
    piece_text_ += static_cast<int64_t>(raw.bytes.size());
    if (piece_text_ >= options_.piece_bytes) {
      const UnitPosition next{segment, reader.offset(), reader.lines()};
      SALA_RETURN_IF_ERROR(ClosePiece(next, /*last=*/false));
      opened_.reset();
    }
  }
  piece_->EndSegment(segment, reader.lines());
  return OkStatus();
}

StatusOr<std::string> IngestWorkers::UnitRun::PlaceInFile(const RawRecord& raw) const {
  const int64_t begin = plan_.segments[segment_].begin;
  SALA_ASSIGN_OR_RETURN(const int64_t before, CountLines(file_->path, begin));
  return Place(file_->path, raw.line + before, raw.offset);
}

Status IngestWorkers::UnitRun::Placed(const Status& status, const RawRecord& raw) const {
  SALA_ASSIGN_OR_RETURN(const std::string place, PlaceInFile(raw));
  return Annotate(status, place);
}

Status IngestWorkers::UnitRun::Take(const RawRecord& raw) {
  const RecordPlace place{segment_, raw.line, raw.offset};
  auto checked = checker_.Check(raw, file_->kind.format, file_->path);
  if (!checked.ok()) {
    // Once more, so that the message has the line of the file.
    RawRecord in_file = raw;
    SALA_ASSIGN_OR_RETURN(const int64_t before,
                          CountLines(file_->path, plan_.segments[segment_].begin));
    in_file.line += before;
    return checker_.Check(in_file, file_->kind.format, file_->path).status();
  }
  for (const RecordCase& found : checked->cases)
    piece_->AddCase(place, checked->record.id, found.rule, found.action);
  return checked->keep ? TakeKept(*checked, place, raw) : OkStatus();
}

Status IngestWorkers::UnitRun::TakeKept(const RecordChecker::Outcome& outcome,
                                        const RecordPlace& place, const RawRecord& raw) {
  const CheckedRecord& record = outcome.record;
  if (opened_ != record.shape) {
    opened_ = record.shape;
    piece_->AddOpened(place, record.shape);
    if (record.is_chat()) SALA_RETURN_IF_ERROR(workers_.encoder_.chats().CheckTokens());
  }
  const Status status = workers_.encoder_.Encode(record, &encoded_);
  if (!status.ok()) {
    if (checker_.RuleOf("chat") == RecordRule::kError || !IsRecordError(status))
      return Placed(status, raw);
    piece_->AddCase(place, record.id, "chat", "skip");
    return OkStatus();
  }
  if (!encoded_.tokens.empty()) {
    piece_->AddDocument(place, record.id, encoded_);
    return OkStatus();
  }
  if (checker_.RuleOf("empty") == RecordRule::kError) {
    return Placed(MakeError(ExitCode::kData, "ING-EMPTY",
                            "the text gives no token; correct the record or set the rule empty to "
                            "skip"),
                  raw);
  }
  piece_->AddCase(place, record.id, "empty", "skip");
  return OkStatus();
}

IngestWorkers::IngestWorkers(const IngestOptions& options, const Tokenizer& tokenizer,
                             const IngestPlan& plan, const RecordEncoder& encoder)
    : options_(options),
      tokenizer_(tokenizer),
      plan_(plan),
      encoder_(encoder),
      directory_(PiecesDirectory(options.output)),
      states_(plan.units.size()),
      hashes_(plan.files.size(), std::string()),
      stop_behind_(kNever) {}

IngestWorkers::~IngestWorkers() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
}

void IngestWorkers::Start() {
  const int64_t most = static_cast<int64_t>(std::max(plan_.units.size(), plan_.files.size()));
  const int64_t count = std::min(ThreadCount(options_.workers), most);
  for (int64_t i = 0; i < count; ++i) threads_.emplace_back([this] { Work(); });
}

void IngestWorkers::Publish(size_t unit, const std::function<void(UnitState&)>& change) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    change(states_[unit]);
  }
  changed_.notify_all();
}

bool IngestWorkers::TakeUnit(size_t* unit) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stop_ || next_unit_ == states_.size() || Stopped(next_unit_)) return false;
  *unit = next_unit_++;
  return true;
}

bool IngestWorkers::TakeHash(size_t* file) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stop_ || next_hash_ == hashes_.size() || stop_behind_ != kNever) return false;
  *file = next_hash_++;
  return true;
}

void IngestWorkers::RunUnit(size_t unit) {
  std::optional<Piece> tail;
  const Status status = [&]() -> Status {
    SALA_ASSIGN_OR_RETURN(RecordChecker checker, RecordChecker::Make(options_));
    UnitRun run(*this, unit, std::move(checker));
    Status result;
    try {
      result = run.Run();
    } catch (const std::exception& error) {  // memory that is not there, above all
      result = ErrorOf(error);
    }
    if (!result.ok()) tail = std::move(run.piece());
    return result;
  }();
  if (!status.ok()) {
    size_t before = stop_behind_;
    while (unit < before && !stop_behind_.compare_exchange_weak(before, unit)) {
    }
  }
  Publish(unit, [&](UnitState& state) {
    state.failure = status;
    state.tail = std::move(tail);
    state.finished = true;
  });
}

void IngestWorkers::RunHash(size_t file) {
  StatusOr<std::string> hash = HashOfFile(plan_.files[file].path, stop_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    hashes_[file] = std::move(hash);
    ++hashes_done_;
  }
  changed_.notify_all();
}

void IngestWorkers::Work() {
  size_t job = 0;
  while (TakeUnit(&job)) RunUnit(job);
  while (TakeHash(&job)) RunHash(job);
}

StatusOr<bool> IngestWorkers::NextPiece(size_t unit, int64_t number, std::optional<Piece>* piece,
                                        Status* failure, const std::function<void()>& on_wait) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    UnitState& state = states_[unit];
    while (state.ready <= number && !state.finished) {
      changed_.wait_for(lock, kWait);
      on_wait();
    }
    if (state.ready <= number) {
      *failure = state.failure;
      *piece = std::move(state.tail);
      return piece->has_value() || !failure->ok();
    }
  }
  const std::string path = PiecePath(directory_, unit, number);
  *piece = Piece::Read(path, plan_.fingerprint);
  if (piece->has_value()) return true;
  return MakeError(ExitCode::kIo, "FILE-READ",
                   path + ": the piece just written cannot be read back; check the disk");
}

StatusOr<std::vector<std::string>> IngestWorkers::InputHashes(
    const std::function<void()>& on_wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (hashes_done_ < hashes_.size()) {
    changed_.wait_for(lock, kWait);
    on_wait();
  }
  std::vector<std::string> out;
  for (auto& hash : hashes_) {
    SALA_RETURN_IF_ERROR(hash.status());
    out.push_back(std::move(*hash));
  }
  return out;
}

}  // namespace sala::data
