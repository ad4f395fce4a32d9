#include "core/prometheus.h"

#include <gtest/gtest.h>

#include <cmath>

namespace sala {
namespace {

TEST(Prometheus, WritesTheTextFormat) {
  const std::string text = PrometheusText(
      {{"steps_total",
        "Steps\ndone \\ all.",
        PrometheusType::kCounter,
        {{{{"run", "a\"b\\c\nd"}}, 12}}},
       {"loss", "Loss.", PrometheusType::kGauge, {{{}, 0.1}, {{{"stage", "s"}, {"x", ""}}, -2}}},
       {"none", "Nothing.", PrometheusType::kGauge, {}},
       {"odd",
        "\"Quoted\".",
        PrometheusType::kGauge,
        {{{}, std::nan("")}, {{}, HUGE_VAL}, {{}, -HUGE_VAL}}}});
  EXPECT_EQ(text,
            "# HELP steps_total Steps\\ndone \\\\ all.\n"
            "# TYPE steps_total counter\n"
            "steps_total{run=\"a\\\"b\\\\c\\nd\"} 12\n"
            "# HELP loss Loss.\n"
            "# TYPE loss gauge\n"
            "loss 0.10000000000000001\n"
            "loss{stage=\"s\",x=\"\"} -2\n"
            "# HELP odd \"Quoted\".\n"
            "# TYPE odd gauge\n"
            "odd NaN\n"
            "odd +Inf\n"
            "odd -Inf\n");
}

}  // namespace
}  // namespace sala
