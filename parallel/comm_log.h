// What this process exchanged with other ranks: the last collectives, for the report of a hang
// (parallel/watchdog.h), and totals, for metrics.
//
//   auto world = Recorded(std::move(mpi_world), "world", ProcessCommLog());
//   auto dp = world->Split(colour);   // recorded too, under its parent's name until
//   NameGroup(**dp, "dp");
//
// Collectives may be called from several threads; another thread may read at any time.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "nlohmann/json_fwd.hpp"
#include "parallel/communicator.h"

namespace sala::parallel {

enum class CommKind : uint8_t {
  kBarrier,
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kGatherText,
  kSendReceive,
  kSplit
};
constexpr size_t kCommKinds = 8;
std::string_view NameOf(CommKind kind);  // "all_reduce"

// One collective call. On all ranks of a communicator calls with the same `number` belong together.
struct CommEntry {
  int64_t sequence = 0;     // of this process, over all communicators
  size_t communicator = 0;  // index into CommLog::communicators()
  int64_t number = 0;       // within the communicator, from 1
  CommKind kind = CommKind::kBarrier;
  int64_t bytes = 0;
  bool running = false;
  double start = 0;  // ClockSeconds()
};

// Bytes that this rank gives to or gets from other ranks: all-gather and reduce-scatter the total
// without its own segment, all-reduce the payload times the other ranks (it is a gather and a sum),
// broadcast the payload, send-receive and gather-text what is received.
struct CommTotals {
  int64_t calls = 0;
  int64_t bytes = 0;
};

class CommLog {
 public:
  static constexpr size_t kKept = 256;

  struct CommunicatorInfo {
    std::string id;     // "0" is the first; "0.2" came from its second Split: equal on all ranks
    std::string group;  // "world", "dp", ...
    std::vector<int> ranks;  // of the first communicator
  };

  CommLog() = default;
  CommLog(const CommLog&) = delete;
  CommLog& operator=(const CommLog&) = delete;

  size_t AddCommunicator(CommunicatorInfo info);
  void Rename(size_t communicator, const std::string& group);

  int64_t Begin(size_t communicator, CommKind kind, int64_t bytes);  // returns the sequence number
  void End(int64_t sequence, int64_t bytes);

  // The last kKept collectives, oldest first, before them those that run for longer.
  std::vector<CommEntry> Entries() const;
  std::vector<CommunicatorInfo> communicators() const;
  // By "GROUP.KIND", for example "dp.all_gather", of the collectives that are done.
  std::map<std::string, CommTotals> Totals() const;

 private:
  struct Counters {
    CommunicatorInfo info;
    int64_t number = 0;
    std::array<CommTotals, kCommKinds> totals;
  };

  mutable std::mutex mutex_;
  int64_t sequence_ = 0;
  std::vector<Counters> communicators_;
  std::array<CommEntry, kKept> ring_;  // by sequence modulo kKept
  std::vector<CommEntry> running_;     // one for each thread that waits
};

// The log of this process.
CommLog& ProcessCommLog();

// Seconds that the calling thread has spent in recorded collectives. What it does itself is the
// rest.
double CommSecondsOfThisThread();

// Records every collective of `comm`, and of what it is split into. What a recorded communicator
// calls of another recorded one is part of its own call and not recorded again, so that one for
// device memory can be recorded around the recorded one for host memory that it uses.
std::unique_ptr<Communicator> Recorded(std::unique_ptr<Communicator> comm, const std::string& group,
                                       CommLog& log);

// `comm`, whose ranks are those of `like`, in the log of `like` under this name; `comm` itself
// where `like` is not recorded.
std::unique_ptr<Communicator> RecordedLike(const Communicator& like,
                                           std::unique_ptr<Communicator> comm,
                                           const std::string& group);

// Another name for a recorded communicator; nothing where it is not recorded.
void NameGroup(Communicator& comm, const std::string& group);

// {"dp.all_gather": {"calls": 3, "bytes": 4096}, ...}: what came to `now` since `before`.
nlohmann::ordered_json CommDelta(const std::map<std::string, CommTotals>& before,
                                 const std::map<std::string, CommTotals>& now);

}  // namespace sala::parallel
