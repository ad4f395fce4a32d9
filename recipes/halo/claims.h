// Five claims of the conversion that compare whole conversions (docs/math/halo.md 9, claims 9 to
// 13), with margins that were fixed before anything was measured, and the verdict on the numbers of
// one seed. Pure arithmetic; recipes/halo/claim_trial.h measures.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace sala::recipes {

// Share of right answers by length of the document in tokens.
using RecallByLength = std::map<int64_t, double>;

struct ConversionNumbers {
  std::vector<int64_t> softmax_layers;
  double kl = 0;  // teacher to hybrid, nats per token of held-out documents
  double student_loss = 0, teacher_loss = 0;
  RecallByLength stream, needle;
};

// Names of the hybrids of a trial.
inline constexpr char kSelectedHybrid[] = "selected";
inline constexpr char kNotAligned[] = "not_aligned";
inline constexpr char kAllLinear[] = "all_linear";
inline constexpr char kRopeEverywhere[] = "rope_everywhere";
inline constexpr char kRandomSet[] = "random_";  // and a number from 1

// Of one seed. What is not there yet has not been measured.
struct ClaimNumbers {
  int64_t length = 0;  // of training, tokens
  std::optional<RecallByLength> teacher_stream, teacher_needle;
  std::vector<double> alignment_errors;  // per layer: error / variance of the target, held out
  std::vector<double> keep_scores;
  std::vector<int64_t> selected;
  std::map<std::string, std::vector<int64_t>> choices;  // by selector: what each would keep
  std::map<std::string, ConversionNumbers> conversions;
  struct Scale {
    double base = 0;  // a; 0: no scale is best
    std::vector<double> candidates, losses;
    RecallByLength needle;  // of the selected hybrid with that scale
  };
  std::optional<Scale> scale;
  double seconds = 0;  // of all pieces, teacher included

  nlohmann::json ToJson() const;
  static ClaimNumbers FromJson(const nlohmann::json& json);  // throws on another layout
};

enum class ClaimVerdict : uint8_t { kHolds, kDoesNotHold, kNotMeasured };
const char* NameOf(ClaimVerdict verdict);  // "holds", "does not hold", "not measured"

struct ClaimResult {
  int number = 0;
  std::string claim;   // "alignment is needed"
  std::string margin;  // "KL without it at least 2 times"
  std::string found;   // the numbers, or why there are none
  ClaimVerdict verdict = ClaimVerdict::kNotMeasured;
};

// Below these shares of right answers of the teacher a claim about recall says nothing.
constexpr double kTeacherFloor = 0.7;

// Claims 9 to 13, in order. `numbers` is complete.
std::vector<ClaimResult> JudgeClaims(const ClaimNumbers& numbers);

}  // namespace sala::recipes
