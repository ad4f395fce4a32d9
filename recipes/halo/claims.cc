#include "recipes/halo/claims.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace sala::recipes {
namespace {

using nlohmann::json;

// The margins of docs/math/halo.md 9, from a pilot with other programs and models.
constexpr double kAlignmentFactor = 2.0;
constexpr double kLinearRecallShare = 0.6;
constexpr double kLinearKlFactor = 2.0;
constexpr double kLengthMargin = 0.1;
constexpr double kScaleMargin = 0.05;

std::string Text(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}
std::string Share(double value) { return Text("%.3f", value); }
std::string Kl(double value) { return Text("%.4f", value); }
std::string Ratio(double a, double b) { return b > 0 ? Text("%.2f x", a / b) : "no ratio"; }

json ToJson(const RecallByLength& recall) {
  json out = json::object();
  for (const auto& [length, share] : recall) out[std::to_string(length)] = share;
  return out;
}

RecallByLength RecallFromJson(const json& object) {
  RecallByLength recall;
  for (const auto& [length, share] : object.items())
    recall[std::stoll(length)] = share.get<double>();
  return recall;
}

// Recall of both tasks at the training length.
double MeanRecall(const RecallByLength& stream, const RecallByLength& needle, int64_t length) {
  return 0.5 * (stream.at(length) + needle.at(length));
}

// Fills the verdict; where the teacher itself recalls too little there is none.
void Decide(bool holds, double teacher_recall, ClaimResult* result) {
  if (teacher_recall < kTeacherFloor) {
    result->verdict = ClaimVerdict::kNotMeasured;
    result->found += "; not measured: the teacher recalls only " + Share(teacher_recall) +
                     ", less than " + Share(kTeacherFloor);
  } else {
    result->verdict = holds ? ClaimVerdict::kHolds : ClaimVerdict::kDoesNotHold;
  }
}

ClaimResult AlignmentIsNeeded(const ClaimNumbers& numbers) {
  const double with = numbers.conversions.at(kSelectedHybrid).kl;
  const double without = numbers.conversions.at(kNotAligned).kl;
  ClaimResult result{
      .number = 9,
      .claim = "alignment (step 1) is needed",
      .margin = "KL without it >= 2 x KL with it",
      .found = "KL " + Kl(without) + " without, " + Kl(with) + " with: " + Ratio(without, with)};
  result.verdict =
      without >= kAlignmentFactor * with ? ClaimVerdict::kHolds : ClaimVerdict::kDoesNotHold;
  return result;
}

ClaimResult SoftmaxLayersAreNeeded(const ClaimNumbers& numbers) {
  const int64_t length = numbers.length;
  const ConversionNumbers& hybrid = numbers.conversions.at(kSelectedHybrid);
  const ConversionNumbers& linear = numbers.conversions.at(kAllLinear);
  const double of_hybrid = MeanRecall(hybrid.stream, hybrid.needle, length);
  const double of_linear = MeanRecall(linear.stream, linear.needle, length);
  ClaimResult result{.number = 10,
                     .claim = "softmax layers are needed",
                     .margin = "all linear: recall < 0.6 x the hybrid's, KL >= 2 x",
                     .found = "recall " + Share(of_linear) + " all linear, " + Share(of_hybrid) +
                              " hybrid: " + Ratio(of_linear, of_hybrid) + "; KL " + Kl(linear.kl) +
                              ", " + Kl(hybrid.kl) + ": " + Ratio(linear.kl, hybrid.kl)};
  Decide(of_linear < kLinearRecallShare * of_hybrid && linear.kl >= kLinearKlFactor * hybrid.kl,
         MeanRecall(*numbers.teacher_stream, *numbers.teacher_needle, length), &result);
  return result;
}

ClaimResult SelectionMatters(const ClaimNumbers& numbers) {
  const double selected = numbers.conversions.at(kSelectedHybrid).kl;
  double sum = 0;
  std::vector<double> others;
  for (const auto& [name, conversion] : numbers.conversions) {
    if (name.rfind(kRandomSet, 0) != 0) continue;
    others.push_back(conversion.kl);
    sum += conversion.kl;
  }
  const double mean = sum / static_cast<double>(others.size());
  const auto better =
      std::count_if(others.begin(), others.end(), [&](double kl) { return kl < selected; });
  ClaimResult result{.number = 11,
                     .claim = "selection matters",
                     .margin = "KL of the selected set < mean over random sets",
                     .found = "KL " + Kl(selected) + " selected, mean " + Kl(mean) + " of " +
                              std::to_string(others.size()) + " random sets (" +
                              Kl(*std::min_element(others.begin(), others.end())) + " to " +
                              Kl(*std::max_element(others.begin(), others.end())) + "), " +
                              std::to_string(better) + " of them better than the selected one"};
  result.verdict = selected < mean ? ClaimVerdict::kHolds : ClaimVerdict::kDoesNotHold;
  return result;
}

ClaimResult HypeExtendsLength(const ClaimNumbers& numbers) {
  const RecallByLength& hype = numbers.conversions.at(kSelectedHybrid).stream;
  const RecallByLength& rope = numbers.conversions.at(kRopeEverywhere).stream;
  ClaimResult result{.number = 12,
                     .claim = "HyPE extends length",
                     .margin =
                         "stream recall at 8 and 16 x the training length: HyPE >= RoPE "
                         "everywhere + 0.1",
                     .found = ""};
  bool holds = true;
  for (int64_t factor : {8, 16}) {
    const int64_t length = factor * numbers.length;
    result.found += (factor == 8 ? "" : "; ") + std::to_string(length) + " tokens: HyPE " +
                    Share(hype.at(length)) + ", RoPE " + Share(rope.at(length)) + ": " +
                    Text("%+.3f", hype.at(length) - rope.at(length));
    holds = holds && hype.at(length) >= rope.at(length) + kLengthMargin;
  }
  Decide(holds, numbers.teacher_stream->at(numbers.length), &result);
  return result;
}

ClaimResult LogitScaleHelps(const ClaimNumbers& numbers) {
  const int64_t length = 2 * numbers.length;
  const double without = numbers.conversions.at(kSelectedHybrid).needle.at(length);
  const double with = numbers.scale->needle.at(length);
  ClaimResult result{.number = 13,
                     .claim = "the logit scale helps HyPE",
                     .margin =
                         "needle recall at 2 x the training length: with the fitted a > "
                         "without + 0.05",
                     .found = std::to_string(length) + " tokens: " + Share(with) + " with a = " +
                              (numbers.scale->base > 0 ? Text("%g", numbers.scale->base) : "none") +
                              ", " + Share(without) + " without: " + Text("%+.3f", with - without)};
  Decide(with > without + kScaleMargin, numbers.teacher_needle->at(numbers.length), &result);
  return result;
}

}  // namespace

const char* NameOf(ClaimVerdict verdict) {
  switch (verdict) {
    case ClaimVerdict::kHolds:
      return "holds";
    case ClaimVerdict::kDoesNotHold:
      return "does not hold";
    case ClaimVerdict::kNotMeasured:
      return "not measured";
  }
  return "";
}

nlohmann::json ClaimNumbers::ToJson() const {
  json out = {{"length", length},           {"alignment_errors", alignment_errors},
              {"keep_scores", keep_scores}, {"selected", selected},
              {"choices", choices},         {"conversions", json::object()},
              {"seconds", seconds}};
  if (teacher_stream)
    out["teacher"] = {{"stream", recipes::ToJson(*teacher_stream)},
                      {"needle", recipes::ToJson(*teacher_needle)}};
  for (const auto& [name, conversion] : conversions) {
    out["conversions"][name] = {{"softmax_layers", conversion.softmax_layers},
                                {"kl", conversion.kl},
                                {"student_loss", conversion.student_loss},
                                {"teacher_loss", conversion.teacher_loss},
                                {"stream", recipes::ToJson(conversion.stream)},
                                {"needle", recipes::ToJson(conversion.needle)}};
  }
  if (scale)
    out["scale"] = {{"base", scale->base},
                    {"candidates", scale->candidates},
                    {"losses", scale->losses},
                    {"needle", recipes::ToJson(scale->needle)}};
  return out;
}

ClaimNumbers ClaimNumbers::FromJson(const nlohmann::json& json) {
  ClaimNumbers numbers;
  numbers.length = json.at("length").get<int64_t>();
  numbers.alignment_errors = json.at("alignment_errors").get<std::vector<double>>();
  numbers.keep_scores = json.at("keep_scores").get<std::vector<double>>();
  numbers.selected = json.at("selected").get<std::vector<int64_t>>();
  numbers.choices = json.at("choices").get<std::map<std::string, std::vector<int64_t>>>();
  numbers.seconds = json.at("seconds").get<double>();
  if (json.contains("teacher")) {
    numbers.teacher_stream = RecallFromJson(json.at("teacher").at("stream"));
    numbers.teacher_needle = RecallFromJson(json.at("teacher").at("needle"));
  }
  for (const auto& [name, conversion] : json.at("conversions").items()) {
    numbers.conversions[name] = {
        .softmax_layers = conversion.at("softmax_layers").get<std::vector<int64_t>>(),
        .kl = conversion.at("kl").get<double>(),
        .student_loss = conversion.at("student_loss").get<double>(),
        .teacher_loss = conversion.at("teacher_loss").get<double>(),
        .stream = RecallFromJson(conversion.at("stream")),
        .needle = RecallFromJson(conversion.at("needle"))};
  }
  if (json.contains("scale")) {
    const nlohmann::json& scale = json.at("scale");
    numbers.scale = Scale{.base = scale.at("base").get<double>(),
                          .candidates = scale.at("candidates").get<std::vector<double>>(),
                          .losses = scale.at("losses").get<std::vector<double>>(),
                          .needle = RecallFromJson(scale.at("needle"))};
  }
  return numbers;
}

std::vector<ClaimResult> JudgeClaims(const ClaimNumbers& numbers) {
  return {AlignmentIsNeeded(numbers), SoftmaxLayersAreNeeded(numbers), SelectionMatters(numbers),
          HypeExtendsLength(numbers), LogitScaleHelps(numbers)};
}

}  // namespace sala::recipes
