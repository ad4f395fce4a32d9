#include "parallel/watchdog.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <set>
#include <utility>

#include "core/clock.h"
#include "core/file.h"
#include "core/log.h"
#include "nlohmann/json.hpp"
#include "parallel/mpi_communicator.h"

namespace sala::parallel {
namespace {

constexpr size_t kMedianOf = 50;
constexpr double kMedianFactor = 5;
// How long a rank whose limit has expired waits for the fault files of the others. Ranks enter a
// step within a collective of each other, so their limits expire together, up to one tick.
constexpr double kGatherSeconds = 4;
// How long the other ranks give the one that prints, and all of them give a log or a disk that
// hangs, before they leave.
constexpr double kPrintSeconds = 4;
constexpr double kLeaveSeconds = 20;
constexpr double kSlowestTick = 1;
constexpr double kFastestTick = 0.02;
constexpr char kReport[] = "fault-report.txt";

std::string FaultName(int rank) {
  std::array<char, 64> name{};
  std::snprintf(name.data(), name.size(), "fault-rank-%05d.json", rank);
  return name.data();
}

bool IsFaultFile(const std::string& name) {
  return name.starts_with("fault-rank-") && name.ends_with(".json");
}

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// Those of one start of the run, or with "" all.
std::vector<RankFault> ReadFaults(const std::string& logs, const std::string& start) {
  std::vector<RankFault> faults;
  const auto names = ListDirectory(logs);
  if (!names.ok()) return faults;
  for (const std::string& name : *names) {
    if (!IsFaultFile(name)) continue;
    const auto text = ReadFile(logs + "/" + name);
    if (!text.ok()) continue;
    auto fault = RankFault::FromJson(*text);
    if (fault.ok() && (start.empty() || fault->start == start))
      faults.push_back(std::move(fault).value());
  }
  std::sort(faults.begin(), faults.end(),
            [](const RankFault& a, const RankFault& b) { return a.rank < b.rank; });
  return faults;
}

std::string SecondsText(double seconds) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), seconds < 10 ? "%.1f s" : "%.0f s", seconds);
  return text.data();
}

// "rank 3", "ranks 0-2, 7".
std::string RanksText(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size();) {
    size_t j = i;
    while (j + 1 < ranks.size() && ranks[j + 1] == ranks[j] + 1) ++j;
    text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
    if (j > i) text += (j == i + 1 ? ", " : "-") + std::to_string(ranks[j]);
    i = j + 1;
  }
  return text;
}

}  // namespace

std::string_view NameOf(Phase phase) {
  constexpr std::array<std::string_view, kPhases> kNames = {"init", "step", "data", "save",
                                                            "evaluation"};
  return kNames[static_cast<size_t>(phase)];
}

void WatchdogConfig::Bind(ConfigBinder& b) {
  b.Field("init_seconds", &init_seconds, {.min = 0});
  b.Field("step_seconds", &step_seconds, {.min = 0});
  b.Field("min_step_seconds", &min_step_seconds, {.min = 0});
  b.Field("data_seconds", &data_seconds, {.min = 0});
  b.Field("save_seconds", &save_seconds, {.min = 0});
  b.Field("evaluation_seconds", &evaluation_seconds, {.min = 0});
}

// ---- the thread ----

StatusOr<std::unique_ptr<Watchdog>> Watchdog::Start(const WatchdogConfig& config,
                                                    const CommLog& log, std::string directory,
                                                    Communicator& world) {
  // Rank 0's process and time name the start.
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  SALA_ASSIGN_OR_RETURN(
      std::vector<std::string> hosts,
      world.AllGatherText(HostName() + " " + std::to_string(getpid()) + "-" + std::to_string(now)));
  const std::string start = hosts[0];
  for (std::string& host : hosts) host.resize(host.find(' '));
  return std::make_unique<Watchdog>(config, log, std::move(directory), world.rank(),
                                    std::move(hosts), start);
}

Watchdog::Watchdog(const WatchdogConfig& config, const CommLog& log, std::string directory,
                   int rank, std::vector<std::string> hosts, std::string start)
    : config_(config),
      log_(log),
      directory_(std::move(directory)),
      rank_(rank),
      hosts_(std::move(hosts)),
      start_(std::move(start)),
      thread_([this] { Watch(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = true;
  }
  ended_.notify_all();
  thread_.join();
}

void Watchdog::Enter(Phase phase, int64_t step) {
  const std::lock_guard<std::mutex> lock(mutex_);
  frames_.push_back({.phase = phase, .seconds = 0, .start = ClockSeconds()});
  if (step >= 0) step_ = step;
}

void Watchdog::Leave() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Frame& frame = frames_.back();
  if (frame.phase == Phase::kStep) {
    step_seconds_.push_back(ClockSeconds() - frame.start);
    if (step_seconds_.size() > kMedianOf) step_seconds_.pop_front();
  }
  frames_.pop_back();
  if (!frames_.empty()) frames_.back().seconds = 0;  // what it waited for has come
}

double Watchdog::Limit(Phase phase) const {
  switch (phase) {
    case Phase::kInit:
      return config_.init_seconds;
    case Phase::kData:
      return config_.data_seconds;
    case Phase::kSave:
      return config_.save_seconds;
    case Phase::kEvaluation:
      return config_.evaluation_seconds;
    case Phase::kStep:
      break;
  }
  if (config_.step_seconds) return *config_.step_seconds;
  if (config_.min_step_seconds == 0 || step_seconds_.empty()) return config_.min_step_seconds;
  std::vector<double> sorted(step_seconds_.begin(), step_seconds_.end());
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return std::max(config_.min_step_seconds, kMedianFactor * *middle);
}

void Watchdog::Watch() {
  double shortest = kSlowestTick * 20;
  for (const double limit :
       {config_.init_seconds, config_.step_seconds.value_or(config_.min_step_seconds),
        config_.data_seconds, config_.save_seconds, config_.evaluation_seconds}) {
    if (limit > 0) shortest = std::min(shortest, limit);
  }
  const double tick = std::max(kFastestTick, shortest / 20);
  std::unique_lock<std::mutex> lock(mutex_);
  double last = ClockSeconds();
  while (!ended_.wait_for(lock, std::chrono::duration<double>(tick), [this] { return end_; })) {
    const double now = ClockSeconds();
    // A tick that took long was one in which this process did not run.
    const double passed = std::min(now - last, 2 * tick);
    last = now;
    if (frames_.empty()) continue;
    Frame& frame = frames_.back();
    frame.seconds += passed;
    const double limit = Limit(frame.phase);
    if (limit > 0 && frame.seconds > limit) Expire(Frame(frame), limit, step_);
  }
}

// Called with the mutex held, which never is released again: the main thread stands still from its
// next section on.
void Watchdog::Expire(const Frame& frame, double limit, int64_t step) {
  constexpr int kExit = static_cast<int>(ExitCode::kDevice);
  // Whatever hangs below, a disk or the log's lock in the main thread's hands: this ends it.
  std::thread([] {
    Sleep(kLeaveSeconds);
    _exit(kExit);
  }).detach();
  // Another rank has given its verdict: this one was stopped, or late, and what it would write now,
  // while the launcher ends the job, would hide that.
  const std::string report = directory_ + "/" + kReport;
  const std::string mark = "start: " + start_ + "\n";  // ends a report of this start
  const auto reported = [&] {
    const auto text = ReadFile(report);
    return text.ok() && text->ends_with(mark);
  };
  if (reported()) _exit(kExit);

  RankFault fault;
  fault.rank = rank_;
  fault.host = hosts_[static_cast<size_t>(rank_)];
  fault.start = start_;
  fault.section = std::string(NameOf(frame.phase));
  fault.seconds = frame.seconds;
  fault.step = step;
  const std::vector<CommLog::CommunicatorInfo> communicators = log_.communicators();
  for (const CommLog::CommunicatorInfo& info : communicators)
    fault.groups[info.id] = {.name = info.group, .ranks = info.ranks};
  const double now = ClockSeconds();
  for (const CommEntry& entry : log_.Entries()) {
    fault.calls.push_back({.communicator = communicators[entry.communicator].id,
                           .number = entry.number,
                           .sequence = entry.sequence,
                           .kind = std::string(NameOf(entry.kind)),
                           .bytes = entry.bytes,
                           .running = entry.running,
                           .seconds = entry.running ? now - entry.start : 0});
  }
  const Status written =
      WriteFileAtomically(directory_ + "/" + FaultName(rank_), fault.ToJson() + "\n");

  std::vector<RankFault> faults;
  for (const double start = ClockSeconds(); ClockSeconds() - start < kGatherSeconds; Sleep(0.05)) {
    faults = ReadFaults(directory_, start_);
    if (faults.size() >= hosts_.size()) break;
  }
  if (faults.empty()) faults.push_back(fault);  // the disk does not take files either
  if (faults.front().rank == rank_) {
    const FaultReport explained = ExplainFaults(faults, hosts_);
    SALA_LOG(Error) << MessageOf(MakeError(
        ExitCode::kDevice, "WATCHDOG",
        explained.paragraph + " Limit of the section: " + SecondsText(limit) + " (run.watchdog)." +
            (written.ok() ? "" : " The fault file was not written: " + MessageOf(written))));
    static_cast<void>(WriteFileAtomically(report, explained.paragraph + "\n" + mark));
  } else {
    for (const double start = ClockSeconds();
         !reported() && ClockSeconds() - start < kPrintSeconds;)
      Sleep(0.05);
  }
  _exit(kExit);
}

// ---- fault files ----

std::string RankFault::ToJson() const {
  nlohmann::ordered_json json = {{"rank", rank},       {"host", host},       {"start", start},
                                 {"section", section}, {"seconds", seconds}, {"step", step}};
  json["communicators"] = nlohmann::ordered_json::object();
  for (const auto& [id, group] : groups)
    json["communicators"][id] = {{"group", group.name}, {"ranks", group.ranks}};
  json["collectives"] = nlohmann::ordered_json::array();
  for (const Call& call : calls) {
    json["collectives"].push_back({{"sequence", call.sequence},
                                   {"communicator", call.communicator},
                                   {"number", call.number},
                                   {"kind", call.kind},
                                   {"bytes", call.bytes},
                                   {"state", call.running ? "running" : "done"},
                                   {"seconds", call.seconds}});
  }
  return json.dump();
}

StatusOr<RankFault> RankFault::FromJson(const std::string& text) {
  try {
    const nlohmann::json json = nlohmann::json::parse(text);
    RankFault fault;
    fault.rank = json.at("rank");
    fault.host = json.at("host");
    fault.start = json.at("start");
    fault.section = json.at("section");
    fault.seconds = json.at("seconds");
    fault.step = json.at("step");
    for (const auto& [id, group] : json.at("communicators").items())
      fault.groups[id] = {.name = group.at("group"),
                          .ranks = group.at("ranks").get<std::vector<int>>()};
    for (const nlohmann::json& call : json.at("collectives")) {
      fault.calls.push_back({.communicator = call.at("communicator"),
                             .number = call.at("number"),
                             .sequence = call.at("sequence"),
                             .kind = call.at("kind"),
                             .bytes = call.at("bytes"),
                             .running = call.at("state") == "running",
                             .seconds = call.at("seconds")});
    }
    return fault;
  } catch (const nlohmann::json::exception& error) {
    return MakeError(ExitCode::kData, "FAULT-FORMAT",
                     std::string("not a fault file: ") + error.what());
  }
}

Status PrepareFaultDirectory(const std::string& logs, const std::vector<std::string>& hosts) {
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(logs));
  const std::string earlier = logs + "/earlier";
  for (const std::string& name : names) {
    if (!IsFaultFile(name) && name != kReport) continue;
    SALA_RETURN_IF_ERROR(MakeDirectories(earlier));
    SALA_RETURN_IF_ERROR(RenamePath(logs + "/" + name, earlier + "/" + name));
  }
  return WriteFileAtomically(logs + "/ranks.json",
                             nlohmann::json({{"hosts", hosts}}).dump() + "\n");
}

StatusOr<FaultReport> ExplainRun(const std::string& logs) {
  const std::vector<RankFault> faults = ReadFaults(logs, "");
  if (faults.empty()) {
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     logs +
                         ": no fault-rank-*.json: no watchdog expired in the last start of this "
                         "run; look at the rank-*.log files there, and in earlier/ for the "
                         "fault-report.txt of a start before");
  }
  std::vector<std::string> hosts;
  if (const auto text = ReadFile(logs + "/ranks.json"); text.ok()) {
    const nlohmann::json json = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (json.is_object() && json.contains("hosts"))
      hosts = json["hosts"].get<std::vector<std::string>>();
  }
  return ExplainFaults(faults, hosts);
}

// ---- the report ----

namespace {

struct Ranks {
  const std::vector<RankFault>& faults;
  const std::vector<std::string>& hosts;

  const RankFault* Find(int rank) const {
    const auto it = std::find_if(faults.begin(), faults.end(),
                                 [&](const RankFault& f) { return f.rank == rank; });
    return it == faults.end() ? nullptr : &*it;
  }
  std::string HostOf(int rank) const {
    if (static_cast<size_t>(rank) < hosts.size()) return hosts[static_cast<size_t>(rank)];
    const RankFault* fault = Find(rank);
    return fault != nullptr ? fault->host : "an unknown host";
  }
  // "ranks 2, 3@fb and rank 5@fc".
  std::string Text(const std::vector<int>& ranks) const {
    std::map<std::string, std::vector<int>> by_host;
    for (const int rank : ranks) by_host[HostOf(rank)].push_back(rank);
    std::vector<std::string> parts;
    parts.reserve(by_host.size());
    for (const auto& [host, of_host] : by_host) parts.push_back(RanksText(of_host) + "@" + host);
    std::string text;
    for (size_t i = 0; i < parts.size(); ++i)
      text += (i == 0 ? "" : i + 1 == parts.size() ? " and " : ", ") + parts[i];
    return text;
  }
};

const RankFault::Call* RunningCall(const RankFault& fault) {
  const auto it = std::find_if(fault.calls.begin(), fault.calls.end(),
                               [](const RankFault::Call& c) { return c.running; });
  return it == fault.calls.end() ? nullptr : &*it;
}

const RankFault::Call* FindCall(const RankFault& fault, const std::string& communicator,
                                int64_t number) {
  const auto it =
      std::find_if(fault.calls.begin(), fault.calls.end(), [&](const RankFault::Call& c) {
        return c.communicator == communicator && c.number == number;
      });
  return it == fault.calls.end() ? nullptr : &*it;
}

// The number of the last call of this communicator; 0 where the log, which is limited, has none.
int64_t LastNumber(const RankFault& fault, const std::string& communicator) {
  int64_t last = 0;
  for (const RankFault::Call& call : fault.calls) {
    if (call.communicator == communicator) last = std::max(last, call.number);
  }
  return last;
}

std::string CallText(const RankFault& fault, const RankFault::Call& call) {
  return call.kind + " number " + std::to_string(call.number) + " of group " +
         fault.groups.at(call.communicator).name + " (" +
         RanksText(fault.groups.at(call.communicator).ranks) + ", " + std::to_string(call.bytes) +
         " bytes, sequence " + std::to_string(call.sequence) + ")";
}

// The earliest collective that some of its ranks entered and others did not, or entered as another
// kind, among those that the files reach back to.
std::string FindDivergence(const Ranks& ranks) {
  std::string found;
  int64_t found_sequence = 0;
  for (const RankFault& fault : ranks.faults) {
    for (const RankFault::Call& call : fault.calls) {
      if (!found.empty() && call.sequence >= found_sequence) break;
      std::string states;
      bool differs = false;
      for (const int rank : fault.groups.at(call.communicator).ranks) {
        const RankFault* other = ranks.Find(rank);
        std::string state = "no fault file";
        if (other != nullptr) {
          const RankFault::Call* same = FindCall(*other, call.communicator, call.number);
          // Calls before the first one that is kept were common.
          if (same == nullptr && LastNumber(*other, call.communicator) >= call.number) continue;
          state = same == nullptr           ? "not entered"
                  : same->kind != call.kind ? "entered as " + same->kind
                  : same->running           ? "entered"
                                            : "done";
          differs = differs || same == nullptr || same->kind != call.kind;
        } else {
          differs = differs || call.running;
        }
        states += (states.empty() ? "" : "; ") + std::string("rank ") + std::to_string(rank) + "@" +
                  ranks.HostOf(rank) + ": " + state;
      }
      if (!differs) continue;
      found = CallText(fault, call) + ": " + states;
      found_sequence = call.sequence;
      break;
    }
  }
  return found;
}

std::string SectionText(const RankFault& fault) {
  return "section " + fault.section +
         (fault.step < 0 ? "" : ", after step " + std::to_string(fault.step));
}

// Ranks that wait in the same collective.
struct Waiting {
  const RankFault* lowest;
  const RankFault::Call* call;
  std::vector<int> ranks;
};

// Most of the section has gone by in this one collective: it hangs.
bool HasWaitedLong(const Waiting& waiting) {
  return waiting.call->seconds > waiting.lowest->seconds / 2;
}

std::string WaitText(const Ranks& ranks, const std::vector<Waiting>& where) {
  constexpr size_t kShown = 3;
  std::string text;
  for (size_t i = 0; i < std::min(kShown, where.size()); ++i) {
    const Waiting& w = where[i];
    text += (i == 0 ? "" : "; ") + ranks.Text(w.ranks) +
            (w.ranks.size() == 1 ? " waits" : " wait") + " for " + SecondsText(w.call->seconds) +
            " in " + CallText(*w.lowest, *w.call) + ", " + SectionText(*w.lowest);
  }
  if (where.size() > kShown)
    text += "; others in " + std::to_string(where.size() - kShown) + " more collectives";
  return text;
}

}  // namespace

FaultReport ExplainFaults(const std::vector<RankFault>& faults,
                          const std::vector<std::string>& hosts) {
  const Ranks ranks{faults, hosts};
  std::set<int> silent;  // wrote nothing
  std::set<int> late;    // wrote a file, stand outside of any collective
  std::set<int> other;   // entered another collective than the rest
  std::vector<int> waiting;
  std::vector<Waiting> where;  // by collective, in the order of the lowest rank in each
  std::string mismatch;
  for (const RankFault& fault : faults) {
    const RankFault::Call* call = RunningCall(fault);
    if (call == nullptr) {
      late.insert(fault.rank);
      continue;
    }
    waiting.push_back(fault.rank);
    auto place = std::find_if(where.begin(), where.end(), [&](const Waiting& w) {
      return w.call->communicator == call->communicator && w.call->number == call->number;
    });
    if (place == where.end()) place = where.insert(where.end(), {&fault, call, {}});
    place->ranks.push_back(fault.rank);
    for (const int rank : fault.groups.at(call->communicator).ranks) {
      const RankFault* peer = ranks.Find(rank);
      if (peer == nullptr) {
        silent.insert(rank);
        continue;
      }
      const RankFault::Call* same = FindCall(*peer, call->communicator, call->number);
      if (same != nullptr && same->kind != call->kind && mismatch.empty()) {
        mismatch = CallText(fault, *call) + " on rank " + std::to_string(fault.rank) + "@" +
                   fault.host + " is " + same->kind + " on rank " + std::to_string(rank) + "@" +
                   peer->host;
        other.insert(rank);
      }
    }
  }
  for (size_t rank = 0; rank < hosts.size(); ++rank) {
    if (waiting.empty() && ranks.Find(static_cast<int>(rank)) == nullptr)
      silent.insert(static_cast<int>(rank));
  }

  FaultReport report;
  report.divergence = FindDivergence(ranks);
  const std::string wait_text = WaitText(ranks, where);
  const std::string again =
      " Then start the same command again: it goes on from the newest checkpoint. The last "
      "collectives of every rank are in logs/fault-rank-*.json; `sala explain-fault RUN` compares "
      "them.";
  if (!mismatch.empty()) {
    report.culprits.assign(other.begin(), other.end());
    report.paragraph = "ranks entered different collectives: " + mismatch +
                       "; this is a defect of the program or ranks that run different versions "
                       "or configurations: compare them and report it." +
                       again;
  } else if (!silent.empty()) {
    report.culprits.assign(silent.begin(), silent.end());
    const std::string who = ranks.Text(report.culprits);
    report.paragraph =
        who +
        " did not arrive and left no fault file (stopped, dead, out of reach "
        "of the network or of the run directory, or still at work in a section "
        "with a longer limit)" +
        (wait_text.empty() ? "" : ", while " + wait_text) +
        ". Look there: is the host up, is the process alive and running, can it "
        "reach the other hosts and write the run directory; leave the host out if it "
        "repeats." +
        again;
  } else if (!late.empty()) {
    report.culprits.assign(late.begin(), late.end());
    report.paragraph = ranks.Text(report.culprits) +
                       " did not arrive: outside of any collective for " +
                       SecondsText(ranks.Find(report.culprits[0])->seconds) + ", " +
                       SectionText(*ranks.Find(report.culprits[0])) +
                       (wait_text.empty() ? "" : ", while " + wait_text) +
                       ". The process lives and hangs or is slow in its own work: look at its "
                       "disks, its device and its log; if the work is only slow, raise the limit "
                       "under run.watchdog." +
                       again;
  } else if (std::none_of(where.begin(), where.end(), HasWaitedLong)) {
    const RankFault& first = faults.front();
    report.paragraph = "no rank is missing and none hangs: " + wait_text +
                       "; the section has lasted " + SecondsText(first.seconds) +
                       ", and its collectives go on, so the work is only slow: raise the limit "
                       "under run.watchdog, or look for a slow rank in metrics/stragglers.jsonl." +
                       again;
  } else {
    report.paragraph = "no rank is missing: " + wait_text +
                       "; every rank has entered its collective and none gets on, so the network "
                       "between hosts does not carry it: " +
                       ranks.Text(waiting) +
                       ". Check that these hosts reach each other (cable, switch, firewall, "
                       "interface) and leave out a host that does not answer; if the work is only "
                       "slow, raise the limit under run.watchdog." +
                       again;
  }
  return report;
}

}  // namespace sala::parallel
