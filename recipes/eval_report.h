// Results of an evaluation as lines of its files, as tables and as a picture. docs/evaluation.md
// has the layout, recipes/eval_files.h says when they are written.
#pragma once

#include <string>
#include <vector>

#include "core/status.h"
#include "nlohmann/json.hpp"
#include "recipes/eval.h"

namespace sala::recipes {

struct Interval {
  double low = 0, high = 0;
};

// Wilson's score interval of a share, 95 %.
Interval WilsonInterval(int64_t right, int64_t count);

// What was measured; goes into every line of summary.jsonl.
struct EvalIdentity {
  std::string stage = {};  // "": outside a run
  std::string when = {};   // before, after; "" outside a run
  int64_t step = -1;       // of the checkpoint; -1: not known
  std::string checkpoint = {};
};

// The line of summary.jsonl, depth buckets [i / depths, (i + 1) / depths), the last one closed.
nlohmann::ordered_json SummaryLine(const TaskResult& result, int64_t depths,
                                   const EvalIdentity& identity);
// Whether a line of summary.jsonl has losses, no shares.
bool OfLosses(const nlohmann::ordered_json& line);
// The texts of TASK-LENGTH.jsonl, a line for each sample, and of summary.jsonl.
std::string SamplesText(const TaskResult& result);
std::string SummaryText(const std::vector<nlohmann::ordered_json>& lines);

// Lines of a summary as text: a table of tasks and lengths, then depth x length of each task.
std::string EvaluationTable(const std::vector<nlohmann::ordered_json>& summary);
std::string EvaluationSvg(const std::vector<nlohmann::ordered_json>& summary);

// DIR/summary.jsonl, or a file of such lines: FILE-MISSING (66), EVAL-FORMAT (65).
StatusOr<std::vector<nlohmann::ordered_json>> ReadSummary(const std::string& directory);
StatusOr<std::vector<nlohmann::ordered_json>> ReadSummaryFile(const std::string& path);
// Its lines until the first that is none; all of them where there is no such line.
std::vector<nlohmann::ordered_json> WholeSummaryLines(const std::string& path);

}  // namespace sala::recipes
