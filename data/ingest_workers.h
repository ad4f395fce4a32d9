// The threads that turn the units of a plan into pieces, and the order in which they are taken.
//
//   IngestWorkers workers(options, tokenizer, plan, encoder);
//   workers.Start();
//   std::optional<Piece> piece;
//   Status failure;
//   SALA_ASSIGN_OR_RETURN(bool more, workers.NextPiece(unit, number, &piece, &failure, on_wait));
//
// Units are handed out in order. When a unit fails, those before it are finished and none behind it
// is begun, so the first mistake of the inputs is reported, whatever the number of workers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/status.h"
#include "data/ingest_piece.h"
#include "data/ingest_plan.h"
#include "data/record_encoder.h"

namespace sala::data {

class IngestWorkers {
 public:
  // All references live as long as this object.
  IngestWorkers(const IngestOptions& options, const Tokenizer& tokenizer, const IngestPlan& plan,
                const RecordEncoder& encoder);
  IngestWorkers(const IngestWorkers&) = delete;
  IngestWorkers& operator=(const IngestWorkers&) = delete;
  ~IngestWorkers();  // stops and joins

  void Start();

  // Waits for piece `number` of `unit`: false when the unit has no more. `on_wait` is called some
  // times a second. *failure: why the unit ends with this piece, which is then its last and is not
  // on disk.
  StatusOr<bool> NextPiece(size_t unit, int64_t number, std::optional<Piece>* piece,
                           Status* failure, const std::function<void()>& on_wait);

  // SHA-256 of every file of the plan, when all units are done.
  StatusOr<std::vector<std::string>> InputHashes(const std::function<void()>& on_wait);

  int64_t bytes_done() const { return bytes_done_.load(std::memory_order_relaxed); }

 private:
  struct UnitState {
    int64_t ready = 0;  // pieces on disk
    bool finished = false;
    Status failure;
    std::optional<Piece> tail;  // of a unit that failed: what came before the mistake
  };
  void Work();
  bool TakeUnit(size_t* unit);
  bool TakeHash(size_t* file);
  void RunUnit(size_t unit);
  void RunHash(size_t file);
  void Publish(size_t unit, const std::function<void(UnitState&)>& change);
  bool Stopped(size_t unit) const { return stop_ || unit > stop_behind_; }

  class UnitRun;
  const IngestOptions& options_;
  const Tokenizer& tokenizer_;
  const IngestPlan& plan_;
  const RecordEncoder& encoder_;
  const std::string directory_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<UnitState> states_;
  std::vector<StatusOr<std::string>> hashes_;
  size_t next_unit_ = 0, next_hash_ = 0, hashes_done_ = 0;
  std::atomic<size_t> stop_behind_;  // units above this number are not wanted
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> bytes_done_{0};
  std::vector<std::thread> threads_;
};

}  // namespace sala::data
