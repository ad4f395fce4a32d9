#include "recipes/step_progress.h"

#include <cmath>

#include "nlohmann/json.hpp"

namespace sala::recipes {
namespace {

double NumberOr(const nlohmann::json& object, const char* key, double fallback) {
  const auto it = object.find(key);
  return it == object.end() || !it->is_number() ? fallback : it->get<double>();
}

}  // namespace

nlohmann::json Progress::ToJson() const {
  return {{"tokens", tokens},
          {"targets", targets},
          {"seconds", seconds},
          {"skipped", skipped},
          {"clipped", clipped},
          {"bad_in_a_row", bad_in_a_row},
          {"first_loss", NumberOrNull(first_loss)},
          {"last_loss", NumberOrNull(last_loss)},
          {"validation_before", NumberOrNull(validation_before)},
          {"validation_after", NumberOrNull(validation_after)}};
}

StepLoopSummary Progress::Summary() const {
  return {.steps = step,
          .tokens = tokens,
          .seconds = seconds,
          .first_loss = first_loss,
          .last_loss = last_loss,
          .validation_before = validation_before,
          .validation_after = validation_after};
}

Progress Progress::FromJson(const nlohmann::json& json, int64_t step) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Progress p;
  p.step = step;
  p.tokens = json.value("tokens", int64_t{0});
  p.targets = json.value("targets", int64_t{0});
  p.seconds = NumberOr(json, "seconds", 0);
  p.skipped = json.value("skipped", int64_t{0});
  p.clipped = json.value("clipped", int64_t{0});
  p.bad_in_a_row = json.value("bad_in_a_row", int64_t{0});
  p.first_loss = NumberOr(json, "first_loss", nan);
  p.last_loss = NumberOr(json, "last_loss", nan);
  p.validation_before = NumberOr(json, "validation_before", nan);
  p.validation_after = NumberOr(json, "validation_after", nan);
  return p;
}

StepLoopSummary SummaryOf(const Checkpoint& checkpoint) {
  const nlohmann::json progress =
      checkpoint.info().trainer.value("progress", nlohmann::json::object());
  return Progress::FromJson(progress, PositionOf(checkpoint).phase_step).Summary();
}

nlohmann::json NumberOrNull(double value) {
  return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr);
}

}  // namespace sala::recipes
