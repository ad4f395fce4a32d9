#include "recipes/schedule.h"

#include <algorithm>
#include <cstdio>
#include <numbers>
#include <set>

#include "core/elementary.h"

namespace sala::recipes {

double LearningRate(const ScheduleConfig& schedule, int64_t step, int64_t steps) {
  const int64_t warmup = schedule.warmup_steps;
  if (step < warmup)
    return schedule.peak_lr * static_cast<double>(step) / static_cast<double>(warmup);
  const double x = std::min(1.0, static_cast<double>(step - warmup) /
                                     static_cast<double>(std::max<int64_t>(1, steps - warmup)));
  switch (schedule.shape) {
    case ScheduleShape::kConstant:
      return schedule.peak_lr;
    case ScheduleShape::kExponential:
      return schedule.peak_lr * PortablePow(schedule.final_lr / schedule.peak_lr, x);
    case ScheduleShape::kLinear:
      return schedule.peak_lr + (schedule.final_lr - schedule.peak_lr) * x;
    case ScheduleShape::kCosine:
      return schedule.final_lr + (schedule.peak_lr - schedule.final_lr) *
                                     (1 + PortableSinCos(std::numbers::pi * x).cos) / 2;
  }
  return schedule.peak_lr;
}

std::string DescribeSchedule(const ScheduleConfig& schedule, int64_t steps) {
  std::set<int64_t> points = {0, std::min(steps - 1, schedule.warmup_steps), steps - 1};
  for (int64_t i = 1; i < 5; ++i) points.insert((steps - 1) * i / 5);
  std::string text = "learning rate";
  for (int64_t step : points) {
    char part[64];
    std::snprintf(part, sizeof(part), "%s step %lld: %.3g", step == 0 ? "" : ",",
                  static_cast<long long>(step), LearningRate(schedule, step, steps));
    text += part;
  }
  return text;
}

}  // namespace sala::recipes
