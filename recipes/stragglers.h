// Which ranks are slow: what each rank computes in a step, without its waiting in collectives,
// where the fast ranks spend the time that the slow ones need.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/status.h"
#include "nlohmann/json_fwd.hpp"
#include "parallel/communicator.h"

namespace sala::recipes {

class Stragglers {
 public:
  // A step of this rank: all its seconds, and those of them in collectives.
  void Add(double step_seconds, double comm_seconds);

  // Collective: one short all-gather. Of every rank median, 95 % quantile and maximum of its last
  // 50 steps, and its seconds in collectives since the last call: {"step", "p50_ms": [by rank],
  // "p95_ms", "max_ms", "comm_ms"}.
  StatusOr<nlohmann::ordered_json> Gather(parallel::Communicator& world, int64_t step);

  // The slowest ranks of all steps up to the last Gather, as lines of a table, on every rank. Empty
  // before the first.
  std::vector<std::string> Table(const std::vector<std::string>& hosts, size_t rows = 5) const;

 private:
  std::deque<double> compute_;  // seconds of the last steps
  double comm_ = 0;             // seconds since the last Gather
  double all_compute_ = 0, all_comm_ = 0;
  int64_t steps_ = 0;
  std::vector<float> gathered_;  // [ranks, kValues]
};

}  // namespace sala::recipes
