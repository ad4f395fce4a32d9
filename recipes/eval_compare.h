// Two evaluations held against each other, sample by sample (docs/evaluation.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "nlohmann/json.hpp"
#include "recipes/eval_report.h"

namespace sala::recipes {

// The mean of per-sample differences with its 95 % interval: percentiles of the means of
// `resamples` resamples of the samples, drawn from the stream. All differences zero: 0 [0, 0].
struct PairedDifference {
  double mean = 0;
  Interval interval;
};
PairedDifference PairedBootstrap(const std::vector<double>& differences, int64_t resamples,
                                 const std::string& stream);

// b against a for every task and length that both have, a line each, on the samples that both have.
// Where the first samples of both are not the same prompts, or were cut by other tokenizers, the
// line has "not_comparable" and no numbers. EVAL-COMPARE (65) with what differs when nothing can be
// compared.
StatusOr<std::vector<nlohmann::ordered_json>> CompareEvaluations(const std::string& a,
                                                                 const std::string& b,
                                                                 int64_t seed);
std::string ComparisonTable(const std::vector<nlohmann::ordered_json>& lines);

// "" where both measured the same samples of a task at a length, so that their shares may be
// compared; else what differs. FILE-MISSING (66), EVAL-FORMAT (65).
StatusOr<std::string> SamplesDifference(const std::string& a, const std::string& b,
                                        const std::string& task, int64_t length);

}  // namespace sala::recipes
