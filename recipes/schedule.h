// Learning-rate schedules: pure functions of the step, so a resumed run continues exactly.
#pragma once

#include <cstdint>
#include <string>

#include "recipes/config.h"

namespace sala::recipes {

// Rate of update number `step` (from 0) of `steps`. With W warm-up steps: peak * step / W below W;
// then, with x = (step - W) / (steps - W): exponential peak * (final / peak)^x, linear peak +
// (final - peak) x, cosine final + (peak - final)(1 + cos(pi x)) / 2, constant peak.
double LearningRate(const ScheduleConfig& schedule, int64_t step, int64_t steps);

// A few lines "step 0: 0, step 10: 1e-3, ..." for the log before step one.
std::string DescribeSchedule(const ScheduleConfig& schedule, int64_t steps);

}  // namespace sala::recipes
