#include "recipes/eval_compare.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "core/file.h"
#include "core/json.h"
#include "core/rng.h"
#include "recipes/eval_files.h"
#include "recipes/text.h"

namespace sala::recipes {
namespace {

using nlohmann::ordered_json;

// Log probability and whether it is right, of each sample by its place.
struct SampleRow {
  double log_probability = 0;
  double right = 0;
  std::string hash;
};

StatusOr<std::vector<SampleRow>> ReadSamples(const std::string& directory, const std::string& task,
                                             int64_t length) {
  const std::string path = directory + "/" + task + "-" + std::to_string(length) + ".jsonl";
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<SampleRow> rows;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const nlohmann::json json = ParseJson(line);
    const auto has = [&json](const char* key, auto is) {
      return json.contains(key) && (json[key].*is)();
    };
    if (!json.is_object() || !has("log_probability", &nlohmann::json::is_number) ||
        !has("prompt_hash", &nlohmann::json::is_string)) {
      return MakeError(ExitCode::kData, "EVAL-FORMAT",
                       Printable(path) + ": line " + std::to_string(rows.size() + 1) +
                           " is no sample of an evaluation; evaluate again");
    }
    const bool right = has("right", &nlohmann::json::is_boolean) && json["right"].get<bool>();
    rows.push_back({json["log_probability"].get<double>(), right ? 1.0 : 0.0,
                    json["prompt_hash"].get<std::string>()});
  }
  return rows;
}

// Differences b - a of one column.
std::vector<double> Differences(const std::vector<SampleRow>& a, const std::vector<SampleRow>& b,
                                double SampleRow::*column) {
  std::vector<double> differences;
  for (size_t i = 0; i < a.size(); ++i) differences.push_back(b[i].*column - a[i].*column);
  return differences;
}

double Mean(const std::vector<SampleRow>& rows, double SampleRow::*column) {
  double sum = 0;
  for (const SampleRow& row : rows) sum += row.*column;
  return sum / static_cast<double>(std::max<size_t>(1, rows.size()));
}

std::string Verdict(const Interval& interval) {
  if (interval.low > 0) return "better";
  if (interval.high < 0) return "worse";
  return "no difference shown";
}

// The verdict, with that of the log probability where it is another.
std::string VerdictText(const ordered_json& line) {
  const auto verdict = line.at("verdict").get<std::string>();
  const auto likelihood = line.value("log_probability_verdict", verdict);
  return verdict == likelihood ? verdict : verdict + "; by log p " + likelihood;
}

// What made the prompts of two evaluations differ, as far as their settings tell.
std::string Cause(const std::string& a, const std::string& b) {
  nlohmann::json first = ReadSettings(a);
  nlohmann::json second = ReadSettings(b);
  if (!first.is_object() || !second.is_object())
    return "they measured other prompts, and their settings are not known";
  std::string causes;
  for (const char* key :
       {"seed", "chat", "tokenizer", "haystack", "held_out_seed", "held_out_fraction", "prompts"}) {
    const nlohmann::json one = {{key, first[key]}};
    const nlohmann::json other = {{key, second[key]}};
    const std::string difference = SettingsDifference(one, other);
    if (!difference.empty()) causes += (causes.empty() ? "" : ", ") + difference;
  }
  return causes.empty() ? "they measured other prompts" : causes;
}

// Rows of one task and length in both; `problem` says why they cannot be paired.
struct Pair {
  std::vector<SampleRow> a, b;
  std::string problem;
};

StatusOr<Pair> PairSamples(const std::string& a, const std::string& b, const std::string& task,
                           int64_t length) {
  Pair pair;
  SALA_ASSIGN_OR_RETURN(pair.a, ReadSamples(a, task, length));
  SALA_ASSIGN_OR_RETURN(pair.b, ReadSamples(b, task, length));
  const size_t both = std::min(pair.a.size(), pair.b.size());
  const bool same =
      both > 0 &&
      std::equal(pair.a.begin(), pair.a.begin() + static_cast<std::ptrdiff_t>(both), pair.b.begin(),
                 [](const SampleRow& x, const SampleRow& y) { return x.hash == y.hash; });
  // A token of one tokenizer is not a token of another: their log probabilities differ by that.
  const nlohmann::json first = ReadSettings(a);
  const nlohmann::json second = ReadSettings(b);
  const bool same_tokens = !first.is_object() || !second.is_object() ||
                           first.value("tokenizer", "") == second.value("tokenizer", "");
  if (!same || !same_tokens) pair.problem = Cause(a, b);
  return pair;
}

ordered_json PairLine(const Pair& pair, bool of_losses, const std::string& task, int64_t length,
                      int64_t seed) {
  constexpr int64_t kResamples = 2000;
  const std::string stream =
      "v1|" + std::to_string(seed) + "|eval_compare|" + task + "|" + std::to_string(length) + "|";
  const PairedDifference log_probability =
      PairedBootstrap(Differences(pair.a, pair.b, &SampleRow::log_probability), kResamples,
                      stream + "log_probability");
  ordered_json row = {{"task", task}, {"length", length}, {"count", pair.a.size()}};
  Interval decides = log_probability.interval;
  if (!of_losses) {
    const PairedDifference share = PairedBootstrap(Differences(pair.a, pair.b, &SampleRow::right),
                                                   kResamples, stream + "right");
    decides = share.interval;
    row["share_a"] = Mean(pair.a, &SampleRow::right);
    row["share_b"] = Mean(pair.b, &SampleRow::right);
    row["difference"] = share.mean;
    row["interval"] = {share.interval.low, share.interval.high};
  }
  row["log_probability_difference"] = log_probability.mean;
  row["log_probability_interval"] = {log_probability.interval.low, log_probability.interval.high};
  row["verdict"] = Verdict(decides);
  // Shares of small models are all 0 or all 1 while the answers become likelier or not.
  if (!of_losses) row["log_probability_verdict"] = Verdict(log_probability.interval);
  return row;
}

using Lines = std::vector<ordered_json>;

Lines::const_iterator SameMeasure(const Lines& lines, const ordered_json& line) {
  return std::find_if(lines.begin(), lines.end(), [&line](const ordered_json& l) {
    return l["task"] == line["task"] && l["length"] == line["length"];
  });
}

ordered_json AloneLine(const ordered_json& line, const std::string& of) {
  return {{"task", line["task"]}, {"length", line["length"]}, {"not_comparable", "only in " + of}};
}

}  // namespace

PairedDifference PairedBootstrap(const std::vector<double>& differences, int64_t resamples,
                                 const std::string& stream) {
  PairedDifference result;
  const size_t n = differences.size();
  if (n == 0) return result;
  for (const double difference : differences) result.mean += difference;
  result.mean /= static_cast<double>(n);
  PhiloxStream rng(stream);
  std::vector<double> means;
  for (int64_t r = 0; r < resamples; ++r) {
    double sum = 0;
    for (size_t draw = 0; draw < n; ++draw) sum += differences[rng.Bounded(n)];
    means.push_back(sum / static_cast<double>(n));
  }
  std::sort(means.begin(), means.end());
  const auto at = [&means](double share) {
    const double place = share * static_cast<double>(means.size() - 1);
    return means[static_cast<size_t>(std::lround(place))];
  };
  result.interval = {at(0.025), at(0.975)};
  return result;
}

StatusOr<std::string> SamplesDifference(const std::string& a, const std::string& b,
                                        const std::string& task, int64_t length) {
  SALA_ASSIGN_OR_RETURN(const Pair pair, PairSamples(a, b, task, length));
  if (!pair.problem.empty()) return pair.problem;
  if (pair.a.size() == pair.b.size()) return std::string();
  return "samples: " + std::to_string(pair.a.size()) + " and " + std::to_string(pair.b.size());
}

StatusOr<std::vector<ordered_json>> CompareEvaluations(const std::string& a, const std::string& b,
                                                       int64_t seed) {
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> summary, ReadSummary(a));
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> other, ReadSummary(b));
  std::vector<ordered_json> lines;
  std::vector<ordered_json> alone;
  bool any = false;
  for (const ordered_json& line : summary) {
    const auto task = line["task"].get<std::string>();
    const auto length = line["length"].get<int64_t>();
    const auto same = SameMeasure(other, line);
    if (same == other.end()) {
      alone.push_back(AloneLine(line, "a"));
      continue;
    }
    if (OfLosses(line) != OfLosses(*same)) {
      return MakeError(ExitCode::kData, "EVAL-COMPARE",
                       Printable(a) + " and " + Printable(b) + ": " + task + " at length " +
                           std::to_string(length) +
                           " has shares in one and losses in the other; evaluate again");
    }
    SALA_ASSIGN_OR_RETURN(Pair pair, PairSamples(a, b, task, length));
    if (!pair.problem.empty()) {
      lines.push_back({{"task", task}, {"length", length}, {"not_comparable", pair.problem}});
      continue;
    }
    const size_t both = std::min(pair.a.size(), pair.b.size());
    pair.a.resize(both);
    pair.b.resize(both);
    lines.push_back(PairLine(pair, OfLosses(line), task, length, seed));
    any = true;
  }
  if (lines.empty()) {
    return MakeError(ExitCode::kData, "EVAL-COMPARE",
                     Printable(a) + " and " + Printable(b) + " have no task and length in common");
  }
  if (!any) {
    return MakeError(ExitCode::kData, "EVAL-COMPARE",
                     Printable(a) + " and " + Printable(b) + ": nothing can be compared; " +
                         lines[0]["not_comparable"].get<std::string>() +
                         "; evaluate both with the same options and tokenizer");
  }
  for (const ordered_json& line : other) {
    if (SameMeasure(summary, line) == summary.end()) alone.push_back(AloneLine(line, "b"));
  }
  lines.insert(lines.end(), alone.begin(), alone.end());
  return lines;
}

std::string ComparisonTable(const std::vector<ordered_json>& lines) {
  std::string text = Padded("task", -18) + Padded("length", 9) + Padded("a", 8) + Padded("b", 8) +
                     Padded("b - a", 9) + Padded("95 % interval", 18) + Padded("log p, b - a", 14) +
                     Padded("95 % interval", 18) + "  b is\n";
  const auto interval = [](const ordered_json& line, const char* key) {
    return Format("%+.3f", line.at(key).at(0).get<double>()) + " " +
           Format("%+.3f", line.at(key).at(1).get<double>());
  };
  for (const ordered_json& line : lines) {
    if (line.contains("not_comparable")) {
      text += Padded(line.at("task").get<std::string>(), -18) +
              Padded(std::to_string(line.at("length").get<int64_t>()), 9) +
              "  not comparable: " + line.at("not_comparable").get<std::string>() + "\n";
      continue;
    }
    const bool shares = line.contains("share_a");
    const auto number = [&line, shares](const char* key, const char* format) {
      return shares ? Format(format, line.at(key).get<double>()) : std::string("-");
    };
    text += Padded(line.at("task").get<std::string>(), -18) +
            Padded(std::to_string(line.at("length").get<int64_t>()), 9) +
            Padded(number("share_a", "%.3f"), 8) + Padded(number("share_b", "%.3f"), 8) +
            Padded(number("difference", "%+.3f"), 9) +
            Padded(shares ? interval(line, "interval") : "-", 18) +
            Padded(Format("%+.3f", line.at("log_probability_difference").get<double>()), 14) +
            Padded(interval(line, "log_probability_interval"), 18) + "  " + VerdictText(line) +
            "\n";
  }
  return text;
}

}  // namespace sala::recipes
