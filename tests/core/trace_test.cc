#include "core/trace.h"

#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <thread>

#include "core/clock.h"
#include "nlohmann/json.hpp"

namespace sala {
namespace {

void Spend(double seconds) {
  const double until = ClockSeconds() + seconds;
  while (ClockSeconds() < until) std::this_thread::yield();
}

TEST(Trace, PartsOfAStepExcludeEachOtherAndAddUp) {
  const double started = ClockSeconds();
  const PartSeconds before = PartSecondsOfThisThread();
  {
    const PartScope loss(StepPart::kLoss);
    Spend(0.01);
    {
      const PartScope forward(StepPart::kForward);
      Spend(0.02);
    }
    Spend(0.01);
  }
  PartSeconds parts = PartSecondsOfThisThread();
  const double whole = ClockSeconds() - started;
  for (size_t p = 0; p < kStepParts; ++p) parts[p] -= before[p];
  // Spend takes at least its time; were the inner part counted in the outer one too, the sum would
  // exceed the whole by 20 ms.
  EXPECT_GE(parts[static_cast<size_t>(StepPart::kLoss)], 0.02);
  EXPECT_GE(parts[static_cast<size_t>(StepPart::kForward)], 0.02);
  EXPECT_LE(std::accumulate(parts.begin(), parts.end(), 0.0), whole + 0.001);
}

TEST(Trace, RecordsWhatBeginsAndEndsWithinItByThread) {
  { const TraceScope unseen("before"); }
  auto* open = new TraceScope("too early");
  StartTrace();
  delete open;
  {
    const TraceScope outer("layer", 3);
    const TraceScope inner("mlp");
    TraceScope exchange;
    exchange.Begin("dp.all_gather", -1, 4096);
  }
  std::thread([] { const TraceScope other("beside"); }).join();
  auto* late = new TraceScope("too late");
  const std::vector<TraceEvent> events = EndTrace();
  delete late;
  { const TraceScope unseen("after"); }
  EXPECT_FALSE(Tracing());
  ASSERT_EQ(events.size(), 4U);
  EXPECT_EQ(events[0].name, "dp.all_gather");
  EXPECT_EQ(events[2].name, "layer");
  EXPECT_LE(events[2].start, events[1].start);
  EXPECT_GE(events[2].start + events[2].seconds, events[1].start + events[1].seconds);
  EXPECT_EQ(events[3].thread, 1);

  const auto json = nlohmann::json::parse(TraceJson(events, 5, "host \"x\""));
  std::vector<nlohmann::json> complete;
  for (const auto& event : json["traceEvents"]) {
    if (event["ph"] == "X") complete.push_back(event);
  }
  ASSERT_EQ(complete.size(), 4U);
  EXPECT_EQ(complete[2]["name"], "layer 3");
  EXPECT_EQ(complete[2]["ts"], 0.0);
  EXPECT_EQ(complete[2]["pid"], 5);
  EXPECT_EQ(complete[0]["args"]["bytes"], 4096);
  EXPECT_EQ(complete[3]["tid"], 1);
}

}  // namespace
}  // namespace sala
