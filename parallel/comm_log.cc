#include "parallel/comm_log.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/clock.h"
#include "core/trace.h"
#include "nlohmann/json.hpp"

namespace sala::parallel {
namespace {

thread_local int recording_depth = 0;
thread_local double thread_seconds = 0;

int64_t Sum(std::span<const int64_t> counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

class RecordedCommunicator : public Communicator {
 public:
  RecordedCommunicator(std::unique_ptr<Communicator> inner, const CommLog::CommunicatorInfo& info,
                       CommLog& log)
      : inner_(std::move(inner)), info_(info), log_(log), index_(log.AddCommunicator(info)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }

  Status Barrier() override {
    const Call call(*this, CommKind::kBarrier, 0);
    return inner_->Barrier();
  }
  Status AllReduce(std::span<double> values, Reduce op) override {
    const Call call(*this, CommKind::kAllReduce, Bytes(values) * others());
    return inner_->AllReduce(values, op);
  }
  Status AllReduce(std::span<int64_t> values, Reduce op) override {
    const Call call(*this, CommKind::kAllReduce, Bytes(values) * others());
    return inner_->AllReduce(values, op);
  }
  Status ReduceScatterSum(std::span<const float> send, std::span<const int64_t> counts,
                          std::span<float> recv) override {
    const Call call(*this, CommKind::kReduceScatter, OfOthers(counts, sizeof(float)));
    return inner_->ReduceScatterSum(send, counts, recv);
  }
  Status ReduceScatterSum(const ConstTensor& send, std::span<const int64_t> counts,
                          const Tensor& recv) override {
    const Call call(*this, CommKind::kReduceScatter, OfOthers(counts, SizeOf(send.dtype())));
    return inner_->ReduceScatterSum(send, counts, recv);
  }
  Status AllGather(std::span<const float> send, std::span<const int64_t> counts,
                   std::span<float> recv) override {
    const Call call(*this, CommKind::kAllGather, OfOthers(counts, sizeof(float)));
    return inner_->AllGather(send, counts, recv);
  }
  Status AllGather(const ConstTensor& send, std::span<const int64_t> counts,
                   const Tensor& recv) override {
    const Call call(*this, CommKind::kAllGather, OfOthers(counts, SizeOf(send.dtype())));
    return inner_->AllGather(send, counts, recv);
  }
  Status Shift(const ConstTensor& send, const Tensor& recv, int by) override {
    const bool receives = 0 <= rank() - by && rank() - by < size();
    const int64_t bytes = send.numel() * static_cast<int64_t>(SizeOf(send.dtype()));
    const Call call(*this, CommKind::kSendReceive, receives ? bytes : 0);
    return inner_->Shift(send, recv, by);
  }
  bool thread_safe() const override { return inner_->thread_safe(); }
  Status Broadcast(std::span<char> bytes, int root) override {
    const Call call(*this, CommKind::kBroadcast, others() > 0 ? Bytes(bytes) : 0);
    return inner_->Broadcast(bytes, root);
  }
  StatusOr<std::vector<std::string>> AllGatherText(const std::string& text) override {
    Call call(*this, CommKind::kGatherText, 0);
    StatusOr<std::vector<std::string>> all = inner_->AllGatherText(text);
    int64_t received = 0;
    if (all.ok()) {
      for (const std::string& each : *all) received += static_cast<int64_t>(each.size());
      call.set_bytes(received - static_cast<int64_t>(text.size()));
    }
    return all;
  }
  // The new communicator learns which ranks it has, for the report of a hang.
  StatusOr<std::unique_ptr<Communicator>> Split(int colour) override {
    const Call call(*this, CommKind::kSplit, 0);
    ++splits_;
    SALA_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> part, inner_->Split(colour));
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                          part->AllGatherText(std::to_string(info_.ranks[RankIndex()])));
    CommLog::CommunicatorInfo info = {
        .id = info_.id + "." + std::to_string(splits_), .group = group(), .ranks = {}};
    for (const std::string& rank : all) info.ranks.push_back(std::stoi(rank));
    return std::unique_ptr<Communicator>(
        std::make_unique<RecordedCommunicator>(std::move(part), info, log_));
  }

  CommLog& log() const { return log_; }
  const CommLog::CommunicatorInfo& info() const { return info_; }
  void Rename(const std::string& group) { log_.Rename(index_, group); }

 private:
  // One call from its begin to its end, exceptions included.
  class Call {
   public:
    Call(const RecordedCommunicator& comm, CommKind kind, int64_t bytes)
        : log_(comm.log_), bytes_(bytes), start_(ClockSeconds()) {
      if (recording_depth++ > 0) return;
      sequence_ = log_.Begin(comm.index_, kind, bytes);
      if (Tracing()) trace_.Begin(comm.group() + "." + std::string(NameOf(kind)), -1, bytes);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() {
      if (--recording_depth > 0) return;
      log_.End(sequence_, bytes_);
      thread_seconds += ClockSeconds() - start_;
    }
    void set_bytes(int64_t bytes) { bytes_ = bytes; }

   private:
    CommLog& log_;
    int64_t sequence_ = 0;
    int64_t bytes_;
    double start_;
    TraceScope trace_;
  };

  template <typename T>
  static int64_t Bytes(std::span<T> values) {
    return static_cast<int64_t>(values.size_bytes());
  }
  size_t RankIndex() const { return static_cast<size_t>(rank()); }
  int64_t others() const { return size() - 1; }
  int64_t OfOthers(std::span<const int64_t> counts, size_t bytes_each) const {
    return (Sum(counts) - counts[RankIndex()]) * static_cast<int64_t>(bytes_each);
  }
  std::string group() const { return log_.communicators()[index_].group; }

  std::unique_ptr<Communicator> inner_;
  CommLog::CommunicatorInfo info_;  // with the name it was made with
  CommLog& log_;
  size_t index_;
  int splits_ = 0;
};

}  // namespace

std::string_view NameOf(CommKind kind) {
  constexpr std::array<std::string_view, kCommKinds> kNames = {
      "barrier",   "all_reduce",  "reduce_scatter", "all_gather",
      "broadcast", "gather_text", "send_receive",   "split"};
  return kNames[static_cast<size_t>(kind)];
}

size_t CommLog::AddCommunicator(CommunicatorInfo info) {
  const std::lock_guard<std::mutex> lock(mutex_);
  communicators_.push_back({.info = std::move(info), .number = 0, .totals = {}});
  return communicators_.size() - 1;
}

void CommLog::Rename(size_t communicator, const std::string& group) {
  const std::lock_guard<std::mutex> lock(mutex_);
  communicators_[communicator].info.group = group;
}

int64_t CommLog::Begin(size_t communicator, CommKind kind, int64_t bytes) {
  const double now = ClockSeconds();
  const std::lock_guard<std::mutex> lock(mutex_);
  const CommEntry entry = {.sequence = ++sequence_,
                           .communicator = communicator,
                           .number = ++communicators_[communicator].number,
                           .kind = kind,
                           .bytes = bytes,
                           .running = true,
                           .start = now};
  ring_[static_cast<size_t>(entry.sequence) % kKept] = entry;
  running_.push_back(entry);
  return entry.sequence;
}

void CommLog::End(int64_t sequence, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto entry = std::find_if(running_.begin(), running_.end(),
                                  [&](const CommEntry& e) { return e.sequence == sequence; });
  CommTotals& totals = communicators_[entry->communicator].totals[static_cast<size_t>(entry->kind)];
  ++totals.calls;
  totals.bytes += bytes;
  CommEntry& kept = ring_[static_cast<size_t>(sequence) % kKept];
  if (kept.sequence == sequence) {
    kept.running = false;
    kept.bytes = bytes;
  }
  running_.erase(entry);
}

std::vector<CommEntry> CommLog::Entries() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t first = std::max<int64_t>(1, sequence_ - static_cast<int64_t>(kKept) + 1);
  std::vector<CommEntry> entries;
  for (const CommEntry& entry : running_) {
    if (entry.sequence < first) entries.push_back(entry);
  }
  for (int64_t s = first; s <= sequence_; ++s)
    entries.push_back(ring_[static_cast<size_t>(s) % kKept]);
  return entries;
}

std::vector<CommLog::CommunicatorInfo> CommLog::communicators() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<CommunicatorInfo> infos;
  infos.reserve(communicators_.size());
  for (const Counters& counters : communicators_) infos.push_back(counters.info);
  return infos;
}

std::map<std::string, CommTotals> CommLog::Totals() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, CommTotals> all;
  for (const Counters& counters : communicators_) {
    for (size_t kind = 0; kind < kCommKinds; ++kind) {
      const CommTotals& part = counters.totals[kind];
      if (part.calls == 0) continue;
      CommTotals& sum =
          all[counters.info.group + "." + std::string(NameOf(static_cast<CommKind>(kind)))];
      sum.calls += part.calls;
      sum.bytes += part.bytes;
    }
  }
  return all;
}

CommLog& ProcessCommLog() {
  // Never destroyed: the watchdog's thread may still read while the process ends.
  static auto* log = new CommLog;
  return *log;
}

double CommSecondsOfThisThread() { return thread_seconds; }

std::unique_ptr<Communicator> Recorded(std::unique_ptr<Communicator> comm, const std::string& group,
                                       CommLog& log) {
  std::vector<int> ranks(static_cast<size_t>(comm->size()));
  std::iota(ranks.begin(), ranks.end(), 0);
  const std::string id = std::to_string(log.communicators().size());
  return std::make_unique<RecordedCommunicator>(
      std::move(comm), CommLog::CommunicatorInfo{.id = id, .group = group, .ranks = ranks}, log);
}

std::unique_ptr<Communicator> RecordedLike(const Communicator& like,
                                           std::unique_ptr<Communicator> comm,
                                           const std::string& group) {
  const auto* recorded = dynamic_cast<const RecordedCommunicator*>(&like);
  if (recorded == nullptr) return comm;
  CommLog::CommunicatorInfo info = recorded->info();
  info.id += "d";  // beside `like`, not one of its parts
  info.group = group;
  return std::make_unique<RecordedCommunicator>(std::move(comm), info, recorded->log());
}

void NameGroup(Communicator& comm, const std::string& group) {
  if (auto* recorded = dynamic_cast<RecordedCommunicator*>(&comm)) recorded->Rename(group);
}

nlohmann::ordered_json CommDelta(const std::map<std::string, CommTotals>& before,
                                 const std::map<std::string, CommTotals>& now) {
  nlohmann::ordered_json delta = nlohmann::ordered_json::object();
  for (const auto& [name, totals] : now) {
    const auto it = before.find(name);
    const CommTotals old = it == before.end() ? CommTotals{} : it->second;
    if (totals.calls == old.calls) continue;
    delta[name] = {{"calls", totals.calls - old.calls}, {"bytes", totals.bytes - old.bytes}};
  }
  return delta;
}

}  // namespace sala::parallel
