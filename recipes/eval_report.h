// Results of an evaluation as files and tables, and the comparison of two evaluations
// (docs/evaluation.md has the layout).
//
//   DIR/TASK-LENGTH.jsonl   a line for each sample
//   DIR/depths.svg          share right by depth and length
//   DIR/summary.jsonl       a line for each task and length; written last: its presence means that
//                           the evaluation is complete
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
// Writes all files of the evaluation. FILE-WRITE (74).
Status WriteEvaluation(const std::string& directory, const std::vector<TaskResult>& results,
                       int64_t depths, const EvalIdentity& identity);

// Lines of a summary as text: a table of tasks and lengths, then depth x length of each task.
std::string EvaluationTable(const std::vector<nlohmann::ordered_json>& summary);
std::string EvaluationSvg(const std::vector<nlohmann::ordered_json>& summary);

// Of a directory that WriteEvaluation wrote: FILE-MISSING (66), EVAL-FORMAT (65).
StatusOr<std::vector<nlohmann::ordered_json>> ReadSummary(const std::string& directory);

// The mean of per-sample differences with its 95 % interval: percentiles of the means of
// `resamples` resamples of the samples, drawn from the stream. All differences zero: 0 [0, 0].
struct PairedDifference {
  double mean = 0;
  Interval interval;
};
PairedDifference PairedBootstrap(const std::vector<double>& differences, int64_t resamples,
                                 const std::string& stream);

// b against a for every task and length that both have, a line each. EVAL-COMPARE (65) when they
// have none in common or measured other prompts.
StatusOr<std::vector<nlohmann::ordered_json>> CompareEvaluations(const std::string& a,
                                                                 const std::string& b,
                                                                 int64_t seed);
std::string ComparisonTable(const std::vector<nlohmann::ordered_json>& lines);

}  // namespace sala::recipes
