#include "recipes/eval_config.h"

#include <algorithm>

#include "core/file.h"
#include "data/synthetic.h"

namespace sala::recipes {
namespace {

constexpr char kBefore[] = "before";
constexpr char kAfter[] = "after";

bool Has(const std::vector<std::string>& list, const std::string& word) {
  return std::find(list.begin(), list.end(), word) != list.end();
}

}  // namespace

bool IsLossTask(const std::string& task) {
  return task == kLossByPosition || task == kLossByContext;
}

std::string TaskProblem(const std::string& task) {
  std::vector<std::string> known = data::RecallTaskNames();
  known.insert(known.end(), {kLossByPosition, kLossByContext});
  if (Has(known, task)) return "";
  std::string all;
  for (const std::string& name : known) all += (all.empty() ? "" : ", ") + name;
  const std::string near = NearestWord(task, known);
  return "found task '" + Printable(task) + "'" +
         (near.empty() ? "" : ", did you mean '" + near + "'?") + "; expected one of " + all;
}

void EvalGate::Bind(ConfigBinder& b) {
  b.Field("task", &task, {.required = true});
  b.Field("length", &length, {.required = true, .min = 1});
  b.Field("min", &min, {.min = 0, .max = 1});
  b.Field("max_drop_from", &max_drop_from);
  b.Field("max_drop", &max_drop, {.min = 0, .max = 1});
  if (!b.reading()) return;
  if (min.has_value() == !max_drop_from.empty()) {
    b.Error("task", min ? "CFG-CONFLICT" : "CFG-MISSING",
            "a gate has either min or max_drop_from with max_drop");
  }
  if (max_drop_from.empty() && max_drop > 0)
    b.Error("max_drop", "CFG-MISSING", "max_drop_from says what is compared with");
}

bool EvalConfig::before() const { return Has(when, kBefore); }
bool EvalConfig::after() const { return Has(when, kAfter); }

void EvalConfig::Bind(ConfigBinder& b) {
  b.Field("when", &when);
  b.Field("tasks", &tasks, {.required = true});
  b.Field("lengths_tokens", &lengths_tokens, {.required = true, .min = 1});
  b.Field("depths", &depths, {.min = 1, .max = 40});
  b.Field("samples", &samples, {.min = 1});
  b.Field("seed", &seed, {.min = 0});
  b.Field("haystack", &haystack);
  b.Field("chat", &chat);
  b.List("gate", &gate);
  if (!b.reading()) return;
  for (const std::string& moment : when) {
    if (moment != kBefore && moment != kAfter)
      b.Error("when", "CFG-RANGE", "found '" + Printable(moment) + "', expected before or after");
  }
  if (when.empty()) b.Error("when", "CFG-RANGE", "names neither before nor after");
  for (const std::string& task : tasks) {
    if (const std::string problem = TaskProblem(task); !problem.empty())
      b.Error("tasks", "EVAL-TASK", problem);
  }
  if (HasRepeats(tasks)) b.Error("tasks", "CFG-CONFLICT", "names a task twice");
  if (HasRepeats(lengths_tokens)) b.Error("lengths_tokens", "CFG-CONFLICT", "names a length twice");
  if (b.Present("tasks") && tasks.empty()) b.Error("tasks", "CFG-RANGE", "names no task");
  if (b.Present("lengths_tokens") && lengths_tokens.empty())
    b.Error("lengths_tokens", "CFG-RANGE", "names no length");
  for (const EvalGate& g : gate) {
    const std::string which = g.task + " at length " + std::to_string(g.length);
    const bool measured =
        Has(tasks, g.task) &&
        std::find(lengths_tokens.begin(), lengths_tokens.end(), g.length) != lengths_tokens.end();
    if (IsLossTask(g.task)) {
      b.Error("gate", "CFG-CONFLICT", which + ": a task of losses has no share of right samples");
    } else if (!measured || !after()) {
      b.Error(
          "gate", "CFG-CONFLICT",
          which + " is not measured after this stage; add it to tasks, lengths_tokens and when");
    } else if (g.max_drop_from == kBefore && !before()) {
      b.Error("gate", "CFG-CONFLICT",
              which + ": max_drop_from is before, which `when` does not name");
    }
  }
}

}  // namespace sala::recipes
