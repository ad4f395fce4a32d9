#include "recipes/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace sala::recipes {
namespace {

constexpr double kRounding = 1e-15;  // a few roundings of float64, relative

// Ten steps of which two warm up, from 0.8 to 0.2: step 6 is in the middle of the eight that
// follow.
TEST(Schedule, KnownRates) {
  const auto rate = [](ScheduleShape shape, int64_t step) {
    return LearningRate({.shape = shape, .peak_lr = 0.8, .final_lr = 0.2, .warmup_steps = 2}, step,
                        10);
  };
  for (const ScheduleShape shape : {ScheduleShape::kConstant, ScheduleShape::kExponential,
                                    ScheduleShape::kLinear, ScheduleShape::kCosine}) {
    EXPECT_EQ(rate(shape, 0), 0);
    EXPECT_EQ(rate(shape, 1), 0.4);
    EXPECT_NEAR(rate(shape, 2), 0.8, kRounding);
    const double last = shape == ScheduleShape::kConstant ? 0.8 : 0.2;
    EXPECT_NEAR(rate(shape, 10), last, kRounding);
    EXPECT_NEAR(rate(shape, 11), last, kRounding);  // and stays there
  }
  EXPECT_EQ(rate(ScheduleShape::kConstant, 6), 0.8);
  EXPECT_NEAR(rate(ScheduleShape::kExponential, 6), 0.4, kRounding);
  EXPECT_NEAR(rate(ScheduleShape::kLinear, 6), 0.5, kRounding);
  EXPECT_NEAR(rate(ScheduleShape::kCosine, 6), 0.5, kRounding);
  EXPECT_NEAR(rate(ScheduleShape::kCosine, 4), 0.2 + 0.3 * (1 + std::sqrt(0.5)), kRounding);
}

TEST(Schedule, WithoutWarmUpTheFirstStepHasThePeak) {
  EXPECT_EQ(LearningRate({.shape = ScheduleShape::kLinear, .peak_lr = 0.8, .final_lr = 0.2}, 0, 10),
            0.8);
}

}  // namespace
}  // namespace sala::recipes
