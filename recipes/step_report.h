// What the step loop tells of its steps: the line of metrics of a logged one, the progress display,
// and at the end of a phase which ranks were slow, what each exchanged and how much memory it had.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/progress.h"
#include "core/trace.h"
#include "nlohmann/json.hpp"
#include "parallel/comm_log.h"
#include "recipes/step_loop.h"
#include "recipes/stragglers.h"

namespace sala::recipes {

// Named values of a step; the first is the loss.
using StepValues = std::vector<std::pair<std::string, double>>;

// Where the time of a step went on this rank.
struct StepTimes {
  double started = 0;  // ClockSeconds()
  double comm_seconds = 0;
  PartSeconds parts{};
};

class StepReport {
 public:
  // What it is given must outlive it.
  StepReport(Session& session, const StepLoopConfig& config, const StepTask& task);

  // Before the first step of this start of the run; nothing may run beside the computation.
  void Begin(const Progress& at_start);
  // In a step, when its gradient is summed: nothing runs beside the computation then, so what was
  // exchanged since the logged step before is exact.
  void GradientSummed();
  // Behind a step. Collective where the step is logged.
  Status Step(const StepData& data, const StepValues& values, const UpdateResult& update, double lr,
              const Progress& progress, const StepTimes& times);
  // Behind the last one. Collective.
  Status End();

 private:
  void AddTimes(const StepTimes& times, nlohmann::ordered_json* line);
  void AddBatch(const StepData& data, const Progress& progress, double step_seconds,
                nlohmann::ordered_json* line) const;
  Status Ranks();  // collective

  Session& session_;
  const StepLoopConfig& config_;
  const StepTask& task_;
  ProgressDisplay display_;
  Stragglers stragglers_;
  Progress at_start_;
  double logged_beside_ = 0;  // of CommQueue::seconds_run
  // Totals when the last logged step and when this step had its summed gradient.
  std::map<std::string, parallel::CommTotals> logged_comm_, summed_comm_;
  nlohmann::ordered_json comm_ = nlohmann::ordered_json::object();  // of the last logged step
};

}  // namespace sala::recipes
