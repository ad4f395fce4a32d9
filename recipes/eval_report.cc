#include "recipes/eval_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "core/file.h"
#include "core/json.h"
#include "core/rng.h"

namespace sala::recipes {
namespace {

using nlohmann::ordered_json;

std::string Format(const char* format, double value) {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

std::string Padded(std::string text, int width) {  // right-aligned where width > 0
  const auto size = static_cast<size_t>(std::abs(width));
  if (text.size() < size) text.insert(width > 0 ? 0 : text.size(), size - text.size(), ' ');
  return text;
}

std::string FileOf(const std::string& directory, const std::string& task, int64_t length) {
  return directory + "/" + task + "-" + std::to_string(length) + ".jsonl";
}

// A path need not be UTF-8.
std::string Dumped(const ordered_json& line) { return DumpJson(line); }

std::string Lines(const std::vector<ordered_json>& lines) {
  std::string text;
  for (const ordered_json& line : lines) text += Dumped(line) + "\n";
  return text;
}

ordered_json SampleLine(const SampleResult& sample, bool of_losses) {
  ordered_json line = {{"index", sample.index},
                       {"depth", nullptr},
                       {"right", nullptr},
                       {"log_probability", sample.log_probability},
                       {"prompt_hash", sample.hash}};
  if (sample.depth != data::kNoDepth) line["depth"] = sample.depth;
  if (!of_losses) line["right"] = sample.right;
  if (!sample.id.empty()) line["id"] = sample.id;
  return line;
}

ordered_json Depths(const TaskResult& result, int64_t depths) {
  ordered_json rows = ordered_json::array();
  const bool any = std::any_of(result.samples.begin(), result.samples.end(),
                               [](const SampleResult& s) { return s.depth != data::kNoDepth; });
  for (int64_t i = 0; any && i < depths; ++i) {
    int64_t right = 0;
    int64_t count = 0;
    for (const SampleResult& sample : result.samples) {
      const auto place = static_cast<int64_t>(sample.depth * static_cast<double>(depths));
      if (sample.depth == data::kNoDepth || std::min(place, depths - 1) != i) continue;
      ++count;
      right += sample.right ? 1 : 0;
    }
    rows.push_back({{"from", static_cast<double>(i) / static_cast<double>(depths)},
                    {"to", static_cast<double>(i + 1) / static_cast<double>(depths)},
                    {"right", right},
                    {"count", count}});
  }
  return rows;
}

bool OfLosses(const ordered_json& line) { return line.contains("buckets"); }

// The lines of each task, in the order of the summary.
std::vector<std::vector<const ordered_json*>> ByTask(const std::vector<ordered_json>& summary) {
  std::vector<std::vector<const ordered_json*>> tasks;
  for (const ordered_json& line : summary) {
    const auto same = std::find_if(tasks.begin(), tasks.end(), [&line](const auto& task) {
      return task[0]->at("task") == line.at("task");
    });
    if (same == tasks.end()) {
      tasks.push_back({&line});
    } else {
      same->push_back(&line);
    }
  }
  return tasks;
}

bool HasDepths(const ordered_json& line) {
  return line.contains("depths") && !line.at("depths").empty();
}

std::string BucketTable(const ordered_json& line) {
  std::string text = line.at("task").get<std::string>() + " at length " +
                     std::to_string(line.at("length").get<int64_t>()) + "\n" +
                     Padded("tokens", 16) + Padded("loss", 10) + Padded("count", 10) + "\n";
  for (const ordered_json& bucket : line.at("buckets")) {
    text += Padded(std::to_string(bucket.at("from").get<int64_t>()) + " - " +
                       std::to_string(bucket.at("to").get<int64_t>()),
                   16) +
            Padded(Format("%.4f", bucket.at("loss").get<double>()), 10) +
            Padded(std::to_string(bucket.at("count").get<int64_t>()), 10) + "\n";
  }
  return text;
}

std::string DepthTable(const std::vector<const ordered_json*>& task) {
  std::string text = task[0]->at("task").get<std::string>() +
                     ": share right by depth and length\n" + Padded("depth", 12);
  for (const ordered_json* line : task)
    text += Padded(std::to_string(line->at("length").get<int64_t>()), 9);
  text += "\n";
  const ordered_json& rows = task[0]->at("depths");
  for (size_t row = 0; row < rows.size(); ++row) {
    text += Padded(Format("%3.0f", 100 * rows[row].at("from").get<double>()) + " - " +
                       Format("%3.0f %%", 100 * rows[row].at("to").get<double>()),
                   12);
    for (const ordered_json* line : task) {
      const ordered_json& cell = line->at("depths").at(row);
      const auto count = cell.at("count").get<double>();
      text += Padded(count > 0 ? Format("%.2f", cell.at("right").get<double>() / count) : "-", 9);
    }
    text += "\n";
  }
  return text;
}

// From a red of no sample right to a blue of all, which most readers can tell apart.
std::string Colour(double share) {
  const auto mix = [share](int none, int all) {
    return static_cast<int>(std::lround(none + (all - none) * share));
  };
  char text[8];
  std::snprintf(text, sizeof(text), "#%02x%02x%02x", mix(0xd7, 0x2c), mix(0x60, 0x7b),
                mix(0x4e, 0xb6));
  return text;
}

// Log probability and whether it is right, of each sample by its place.
struct SampleRow {
  double log_probability = 0;
  double right = 0;
  std::string hash;
};

StatusOr<std::vector<SampleRow>> ReadSamples(const std::string& directory, const std::string& task,
                                             int64_t length) {
  const std::string path = FileOf(directory, task, length);
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
                       path + ": line " + std::to_string(rows.size() + 1) +
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

std::string Verdict(const Interval& interval) {
  if (interval.low > 0) return "better";
  if (interval.high < 0) return "worse";
  return "no difference shown";
}

}  // namespace

Interval WilsonInterval(int64_t right, int64_t count) {
  if (count < 1) return {0, 1};
  constexpr double kZ = 1.959963984540054;  // 97.5 % of the standard normal
  const auto n = static_cast<double>(count);
  const double share = static_cast<double>(right) / n;
  const double middle = (share + kZ * kZ / (2 * n)) / (1 + kZ * kZ / n);
  const double half =
      kZ / (1 + kZ * kZ / n) * std::sqrt(share * (1 - share) / n + kZ * kZ / (4 * n * n));
  // At the ends the formula gives the end itself, but for rounding.
  return {right == 0 ? 0.0 : middle - half, right == count ? 1.0 : middle + half};
}

ordered_json SummaryLine(const TaskResult& result, int64_t depths, const EvalIdentity& identity) {
  ordered_json line = {{"task", result.task}, {"length", result.length}};
  if (result.of_losses()) {
    line["count"] = result.samples.size();
    line["buckets"] = ordered_json::array();
    for (const LossBucket& bucket : result.buckets) {
      line["buckets"].push_back({{"from", bucket.from},
                                 {"to", bucket.to},
                                 {"loss", bucket.loss},
                                 {"count", bucket.count}});
    }
  } else {
    const auto count = static_cast<int64_t>(result.samples.size());
    const Interval interval = WilsonInterval(result.right(), count);
    line["count"] = count;
    line["right"] = result.right();
    line["share"] = result.share();
    line["interval"] = {interval.low, interval.high};
    line["mean_log_probability"] = result.mean_log_probability();
    line["depths"] = Depths(result, depths);
  }
  line["stage"] = identity.stage.empty() ? ordered_json() : ordered_json(identity.stage);
  line["when"] = identity.when.empty() ? ordered_json() : ordered_json(identity.when);
  line["step"] = identity.step < 0 ? ordered_json() : ordered_json(identity.step);
  line["checkpoint"] = identity.checkpoint;
  return line;
}

Status WriteEvaluation(const std::string& directory, const std::vector<TaskResult>& results,
                       int64_t depths, const EvalIdentity& identity) {
  SALA_RETURN_IF_ERROR(MakeDirectories(directory));
  std::vector<ordered_json> summary;
  for (const TaskResult& result : results) {
    std::vector<ordered_json> samples;
    for (const SampleResult& sample : result.samples)
      samples.push_back(SampleLine(sample, result.of_losses()));
    SALA_RETURN_IF_ERROR(
        WriteFileAtomically(FileOf(directory, result.task, result.length), Lines(samples)));
    summary.push_back(SummaryLine(result, depths, identity));
  }
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/depths.svg", EvaluationSvg(summary)));
  return WriteFileAtomically(directory + "/summary.jsonl", Lines(summary));
}

std::string EvaluationTable(const std::vector<ordered_json>& summary) {
  std::string text = Padded("task", -18) + Padded("length", 9) + Padded("right", 12) +
                     Padded("share", 8) + Padded("95 % interval", 16) + Padded("log p", 10) + "\n";
  for (const ordered_json& line : summary) {
    if (OfLosses(line)) continue;
    text += Padded(line.at("task").get<std::string>(), -18) +
            Padded(std::to_string(line.at("length").get<int64_t>()), 9) +
            Padded(std::to_string(line.at("right").get<int64_t>()) + " of " +
                       std::to_string(line.at("count").get<int64_t>()),
                   12) +
            Padded(Format("%.3f", line.at("share").get<double>()), 8) +
            Padded(Format("%.3f", line.at("interval").at(0).get<double>()) + " - " +
                       Format("%.3f", line.at("interval").at(1).get<double>()),
                   16) +
            Padded(Format("%.3f", line.at("mean_log_probability").get<double>()), 10) + "\n";
  }
  for (const auto& task : ByTask(summary)) {
    if (HasDepths(*task[0])) text += "\n" + DepthTable(task);
  }
  for (const ordered_json& line : summary) {
    if (OfLosses(line)) text += "\n" + BucketTable(line);
  }
  return text;
}

std::string EvaluationSvg(const std::vector<ordered_json>& summary) {
  constexpr int kCell = 44;
  constexpr int kRow = 22;
  constexpr int kLeft = 96;
  constexpr int kTitle = 44;
  std::string body;
  int y = 10;
  int width = 320;
  const auto label = [&body](int x, int at, const std::string& text, const char* anchor) {
    body += "<text x=\"" + std::to_string(x) + "\" y=\"" + std::to_string(at) +
            "\" text-anchor=\"" + anchor + "\">" + text + "</text>\n";
  };
  for (const auto& task : ByTask(summary)) {
    if (!HasDepths(*task[0])) continue;
    label(10, y + 14, task[0]->at("task").get<std::string>(), "start");
    for (size_t column = 0; column < task.size(); ++column) {
      const int x = kLeft + static_cast<int>(column) * kCell;
      width = std::max(width, x + kCell + 10);
      label(x + kCell / 2, y + 34, std::to_string(task[column]->at("length").get<int64_t>()),
            "middle");
      const ordered_json& rows = task[column]->at("depths");
      for (size_t row = 0; row < rows.size(); ++row) {
        const int top = y + kTitle + static_cast<int>(row) * kRow;
        const auto count = rows[row].at("count").get<double>();
        const double share = count > 0 ? rows[row].at("right").get<double>() / count : 0;
        body += "<rect x=\"" + std::to_string(x) + "\" y=\"" + std::to_string(top) + "\" width=\"" +
                std::to_string(kCell - 2) + "\" height=\"" + std::to_string(kRow - 2) +
                "\" fill=\"" + (count > 0 ? Colour(share) : "#e0e0e0") + "\"/>\n";
        if (count > 0) label(x + kCell / 2 - 1, top + 15, Format("%.2f", share), "middle");
        if (column == 0) {
          label(kLeft - 8, top + 15,
                Format("%.0f", 100 * rows[row].at("from").get<double>()) + " - " +
                    Format("%.0f %%", 100 * rows[row].at("to").get<double>()),
                "end");
        }
      }
    }
    y += kTitle + kRow * static_cast<int>(task[0]->at("depths").size()) + 16;
  }
  return "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + std::to_string(width) +
         "\" height=\"" + std::to_string(y + 10) +
         "\" font-family=\"sans-serif\" font-size=\"12\">\n"
         "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n" +
         body + "</svg>\n";
}

StatusOr<std::vector<ordered_json>> ReadSummary(const std::string& directory) {
  const std::string path = directory + "/summary.jsonl";
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<ordered_json> summary;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const auto json = ordered_json::parse(line, nullptr, /*allow_exceptions=*/false);
    const auto is = [&json](const char* key, auto kind) {
      return json.contains(key) && (json[key].*kind)();
    };
    const bool known =
        json.is_object() && is("task", &ordered_json::is_string) &&
        is("length", &ordered_json::is_number_integer) &&
        (is("buckets", &ordered_json::is_array) || is("share", &ordered_json::is_number));
    if (!known) {
      return MakeError(ExitCode::kData, "EVAL-FORMAT",
                       path + ": line " + std::to_string(summary.size() + 1) +
                           " is no line of a summary; evaluate again");
    }
    summary.push_back(json);
  }
  return summary;
}

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

StatusOr<std::vector<ordered_json>> CompareEvaluations(const std::string& a, const std::string& b,
                                                       int64_t seed) {
  constexpr int64_t kResamples = 2000;
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> summary, ReadSummary(a));
  SALA_ASSIGN_OR_RETURN(const std::vector<ordered_json> other, ReadSummary(b));
  std::vector<ordered_json> lines;
  for (const ordered_json& line : summary) {
    const auto task = line["task"].get<std::string>();
    const auto length = line["length"].get<int64_t>();
    const auto same = std::find_if(other.begin(), other.end(), [&line](const ordered_json& l) {
      return l["task"] == line["task"] && l["length"] == line["length"];
    });
    if (same == other.end()) continue;
    if (OfLosses(line) != OfLosses(*same)) {
      return MakeError(ExitCode::kData, "EVAL-COMPARE",
                       a + " and " + b + ": " + task + " at length " + std::to_string(length) +
                           " has shares in one and losses in the other; evaluate again");
    }
    SALA_ASSIGN_OR_RETURN(const std::vector<SampleRow> rows_a, ReadSamples(a, task, length));
    SALA_ASSIGN_OR_RETURN(const std::vector<SampleRow> rows_b, ReadSamples(b, task, length));
    const bool paired =
        rows_a.size() == rows_b.size() &&
        std::equal(rows_a.begin(), rows_a.end(), rows_b.begin(),
                   [](const SampleRow& x, const SampleRow& y) { return x.hash == y.hash; });
    if (!paired) {
      return MakeError(ExitCode::kData, "EVAL-COMPARE",
                       a + " and " + b + ": " + task + " at length " + std::to_string(length) +
                           " was measured on other prompts; evaluate both with the same options "
                           "and tokenizer");
    }
    const std::string stream =
        "v1|" + std::to_string(seed) + "|eval_compare|" + task + "|" + std::to_string(length) + "|";
    const PairedDifference log_probability =
        PairedBootstrap(Differences(rows_a, rows_b, &SampleRow::log_probability), kResamples,
                        stream + "log_probability");
    ordered_json row = {{"task", task}, {"length", length}, {"count", rows_a.size()}};
    Interval decides = log_probability.interval;
    if (!OfLosses(line)) {
      const PairedDifference share = PairedBootstrap(Differences(rows_a, rows_b, &SampleRow::right),
                                                     kResamples, stream + "right");
      decides = share.interval;
      row["share_a"] = line["share"];
      row["share_b"] = (*same)["share"];
      row["difference"] = share.mean;
      row["interval"] = {share.interval.low, share.interval.high};
    }
    row["log_probability_difference"] = log_probability.mean;
    row["log_probability_interval"] = {log_probability.interval.low, log_probability.interval.high};
    row["verdict"] = Verdict(decides);
    lines.push_back(row);
  }
  if (lines.empty()) {
    return MakeError(ExitCode::kData, "EVAL-COMPARE",
                     a + " and " + b + " have no task and length in common");
  }
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
            Padded(interval(line, "log_probability_interval"), 18) + "  " +
            line.at("verdict").get<std::string>() + "\n";
  }
  return text;
}

}  // namespace sala::recipes
