// Ends a run that hangs, and says which rank is the cause. One thread per rank.
//
// The main thread marks what it is doing:
//
//   const parallel::Section section(session.watchdog(), parallel::Phase::kStep, global_step);
//
// The innermost section has a time limit. When it expires the thread writes
// RUN/logs/fault-rank-NNNNN.json {rank, host, section, seconds, step, the last collectives}, waits
// a moment for the files of the other ranks, and the lowest rank that has written one prints
// WATCHDOG: one paragraph (ExplainFaults) on stderr and in its log. Then the process leaves with
// exit code 71 by _exit, because MPI belongs to the main thread; the launcher ends the other ranks.
//
// Time in which the process itself was stopped (SIGSTOP, a debugger) does not count.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core/config.h"
#include "core/status.h"
#include "parallel/comm_log.h"

namespace sala::parallel {

enum class Phase : uint8_t { kInit, kStep, kData, kSave, kEvaluation };
constexpr size_t kPhases = 5;
std::string_view NameOf(Phase phase);  // "init", "step", "data", "save", "evaluation"

// Seconds; 0: no limit.
struct WatchdogConfig {
  double init_seconds = 600;
  std::optional<double> step_seconds;  // absent: the larger of min_step_seconds and five times the
                                       // median of the last 50 steps
  double min_step_seconds = 300;
  double data_seconds = 300;
  double save_seconds = 1800;
  double evaluation_seconds = 3600;

  void Bind(ConfigBinder& b);
};

class Watchdog {
 public:
  // `directory` is where fault files go, RUN/logs. Collective: the ranks tell each other their
  // hosts.
  static StatusOr<std::unique_ptr<Watchdog>> Start(const WatchdogConfig& config, const CommLog& log,
                                                   std::string directory, Communicator& world);
  // `start` is a text that only the ranks of this start of the run have: files of others count as
  // not there.
  Watchdog(const WatchdogConfig& config, const CommLog& log, std::string directory, int rank,
           std::vector<std::string> hosts, std::string start);
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  ~Watchdog();  // no limit holds any more

  const std::vector<std::string>& hosts() const { return hosts_; }  // of all ranks

 private:
  friend class Section;
  struct Frame {
    Phase phase;
    double seconds = 0;  // counted by the watchdog's thread since it is innermost
    double start = 0;    // ClockSeconds()
  };

  void Enter(Phase phase, int64_t step);
  void Leave();
  double Limit(Phase phase) const;
  void Watch();
  [[noreturn]] void Expire(const Frame& frame, double limit, int64_t step);

  const WatchdogConfig config_;
  const CommLog& log_;
  const std::string directory_;
  const int rank_;
  const std::vector<std::string> hosts_;
  const std::string start_;

  std::mutex mutex_;
  std::condition_variable ended_;
  bool end_ = false;
  std::vector<Frame> frames_;
  int64_t step_ = -1;
  std::deque<double> step_seconds_;  // of the last steps
  std::thread thread_;
};

class Section {
 public:
  // `step`: the global step, -1 where it does not change.
  Section(Watchdog& watchdog, Phase phase, int64_t step = -1) : watchdog_(watchdog) {
    watchdog_.Enter(phase, step);
  }
  Section(const Section&) = delete;
  Section& operator=(const Section&) = delete;
  ~Section() { watchdog_.Leave(); }

 private:
  Watchdog& watchdog_;
};

// What a fault file holds.
struct RankFault {
  struct Call {
    std::string communicator;  // id
    int64_t number = 0;        // within the communicator
    int64_t sequence = 0;
    std::string kind;
    int64_t bytes = 0;
    bool running = false;
    double seconds = 0;  // that it has been running
  };
  struct Group {
    std::string name;
    std::vector<int> ranks;
  };
  int rank = 0;
  std::string host;
  std::string start;  // of the run, see Watchdog
  std::string section;
  double seconds = 0;
  int64_t step = -1;
  std::map<std::string, Group> groups;  // by id of communicator
  std::vector<Call> calls;              // oldest first

  std::string ToJson() const;
  static StatusOr<RankFault> FromJson(const std::string& text);
};

// What the fault files of a run tell.
struct FaultReport {
  std::vector<int> culprits;  // none: every rank waits and none is missing
  std::string paragraph;      // which rank did not arrive where, for how long, what to do
  std::string divergence;     // the first collective not common to all its ranks; "" if none
};

// `faults` is not empty; `hosts` are those of all ranks, by rank.
FaultReport ExplainFaults(const std::vector<RankFault>& faults,
                          const std::vector<std::string>& hosts);

// RUN/logs/fault-rank-*.json and the hosts of the ranks from RUN/logs/ranks.json. FILE-MISSING (66)
// where there is no fault file; one that cannot be read counts as not there.
StatusOr<FaultReport> ExplainRun(const std::string& logs);

// On one rank, before any Watchdog: moves the fault files of an earlier start to logs/earlier and
// writes ranks.json.
Status PrepareFaultDirectory(const std::string& logs, const std::vector<std::string>& hosts);

}  // namespace sala::parallel
