// What a phase of training has done so far: counted by the step loop, kept in every checkpoint.
#pragma once

#include <cstdint>
#include <limits>

#include "nlohmann/json_fwd.hpp"
#include "recipes/checkpointing.h"

namespace sala::recipes {

struct StepLoopSummary {
  int64_t steps = 0;
  int64_t tokens = 0;                                  // of the phase, over its whole life
  double seconds = 0;                                  // likewise
  double first_loss = 0, last_loss = 0;                // training loss of the first and last step
  double validation_before = 0, validation_after = 0;  // NaN where not measured
};

// Over the whole life of a phase, of all its starts together.
struct Progress {
  int64_t step = 0;  // done
  int64_t tokens = 0;
  int64_t targets = 0;
  double seconds = 0;
  int64_t skipped = 0;
  int64_t clipped = 0;
  int64_t bad_in_a_row = 0;
  double first_loss = std::numeric_limits<double>::quiet_NaN();
  double last_loss = std::numeric_limits<double>::quiet_NaN();
  double validation_before = std::numeric_limits<double>::quiet_NaN();
  double validation_after = std::numeric_limits<double>::quiet_NaN();

  // All but the steps, which the checkpoint's position has.
  nlohmann::json ToJson() const;
  static Progress FromJson(const nlohmann::json& json, int64_t step);
  StepLoopSummary Summary() const;
};

// What a phase had done when this checkpoint was taken.
StepLoopSummary SummaryOf(const Checkpoint& checkpoint);

// JSON has no NaN: null stands for "not measured".
nlohmann::json NumberOrNull(double value);

}  // namespace sala::recipes
