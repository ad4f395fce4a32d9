// What a run shows to programs that watch it: TensorBoard event files in RUN/tb and a Prometheus
// text file RUN/metrics.prom. Both say what the metrics files say. Rank 0 only.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "core/status.h"
#include "core/tensorboard.h"
#include "nlohmann/json.hpp"
#include "recipes/config.h"

namespace sala::recipes {

// The numbers of a line of metrics/*.jsonl by tag: "STAGE/KEY", in phases of HALO
// "STAGE/PHASE/KEY"; `group` ("validation") stands before the key.
Scalars ScalarsOf(const nlohmann::ordered_json& line, const std::string& group = "");
// Of a line of RUN/eval/*/summary.jsonl: "STAGE/eval/TASK LENGTH WHEN/share" and
// ".../mean_log_probability", or the loss of each bucket of positions.
Scalars EvaluationScalars(const nlohmann::json& line);

class Dashboards {
 public:
  Dashboards() = default;
  Dashboards(const RunConfig& run, std::string name, std::string host);

  // The first step of this start of the run: readers forget what earlier starts said of it and
  // later ones.
  Status Start(int64_t step);
  Status Train(const nlohmann::ordered_json& line);
  Status Validation(const nlohmann::ordered_json& line);
  // Evaluations that came to RUN/eval since the last call, or since this start.
  Status Evaluations();
  // metrics.prom, at most once a second while the state stays.
  Status State(const std::string& state, const std::string& stage, int64_t step);

 private:
  std::string PrometheusPage() const;

  RunConfig run_;
  std::string name_, host_;
  EventFile events_;
  std::set<std::string> evaluations_;          // whose events are written
  nlohmann::ordered_json train_, validation_;  // the last line of each
  std::string state_, stage_;
  int64_t step_ = 0;
  double written_seconds_ = 0;
};

}  // namespace sala::recipes
