// The `eval` section of a stage: what is measured before and after it, and what must hold
// (docs/evaluation.md).
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/config.h"

namespace sala::recipes {

// A limit on the share of right samples of one task at one length, after the stage.
struct EvalGate {
  std::string task;
  int64_t length = 0;
  std::optional<double> min;
  // At most `max_drop` below what the named stage had after it; "before": this stage before it.
  std::string max_drop_from;
  double max_drop = 0;

  void Bind(ConfigBinder& b);
};

struct EvalConfig {
  std::vector<std::string> when = {"after"};  // before, after
  std::vector<std::string> tasks;
  std::vector<int64_t> lengths_tokens;
  int64_t depths = 10;  // equal parts of the context that right samples are counted in
  int64_t samples = 50;
  int64_t seed = 1234;
  std::string haystack;  // a text dataset; "": none
  bool chat = false;     // prompts as a user's message, answers as the assistant's
  std::vector<EvalGate> gate;

  bool before() const;
  bool after() const;
  void Bind(ConfigBinder& b);
};

// Whether a list of tasks or lengths names one twice.
template <typename T>
bool HasRepeats(std::vector<T> values) {
  std::sort(values.begin(), values.end());
  return std::adjacent_find(values.begin(), values.end()) != values.end();
}

// Tasks of `sala eval` and `eval.tasks`: those of data/synthetic.h and the two that measure losses.
inline constexpr char kLossByPosition[] = "loss_by_position";
inline constexpr char kLossByContext[] = "loss_by_context";
bool IsLossTask(const std::string& task);
// "" when there is such a task, else what is wrong, with the nearest name.
std::string TaskProblem(const std::string& task);

}  // namespace sala::recipes
