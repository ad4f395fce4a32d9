// Comparisons of whole runs and their checkpoints, for the checks of `sala verify`.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "recipes/verify.h"

namespace sala::recipes {

// "model.layers.3.mlp.up_proj.weight (layer 3, exp_avg)"
std::string Named(const TensorDifference& tensor);

// Steps (begin, end] of a run.
struct StepRange {
  int64_t begin = 0;
  int64_t end = std::numeric_limits<int64_t>::max();
};

// Where steps are not the same bits in both runs; "" when they are. The first one only: all later
// ones follow from it. `run_b` has the steps of the range, `run_a` those and others.
StatusOr<std::string> FirstOtherStep(const std::string& run_a, const std::string& run_b,
                                     const StepRange& range = {});

// Tensor by tensor, of two checkpoint directories.
StatusOr<std::vector<TensorDifference>> Differences(const std::string& a, const std::string& b);

// What was compared bit for bit.
struct BitCount {
  int64_t tensors = 0, other = 0;
};

std::string BitsText(const BitCount& count);

// Final checkpoints of a stage, bit for bit; the first tensors that differ become lines of `found`.
Status CompareFinals(const std::string& where, const std::string& run_a, const std::string& run_b,
                     const std::string& stage, BitCount* count, std::vector<std::string>* found);

// Two runs of one pipeline: every step and every stage's final checkpoint. Differences become
// failures of `row`.
Status CompareRuns(const std::string& where, const VerifyContext& context, const std::string& run_a,
                   const std::string& run_b, BitCount* count, VerifyRow* row);

}  // namespace sala::recipes
