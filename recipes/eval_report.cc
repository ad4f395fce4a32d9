#include "recipes/eval_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "core/file.h"
#include "core/json.h"
#include "recipes/text.h"

namespace sala::recipes {
namespace {

using nlohmann::ordered_json;

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

// False at the first line that is none; those in front of it are in `summary`.
bool ParseSummary(const std::string& text, std::vector<ordered_json>* summary) {
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
    if (!known) return false;
    summary->push_back(json);
  }
  return true;
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

std::string SamplesText(const TaskResult& result) {
  std::vector<ordered_json> samples;
  for (const SampleResult& sample : result.samples)
    samples.push_back(SampleLine(sample, result.of_losses()));
  return SummaryText(samples);
}

// A path need not be UTF-8.
std::string SummaryText(const std::vector<ordered_json>& lines) {
  std::string text;
  for (const ordered_json& line : lines) text += DumpJson(line) + "\n";
  return text;
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

bool OfLosses(const ordered_json& line) { return line.contains("buckets"); }

StatusOr<std::vector<ordered_json>> ReadSummary(const std::string& directory) {
  return ReadSummaryFile(directory + "/summary.jsonl");
}

StatusOr<std::vector<ordered_json>> ReadSummaryFile(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<ordered_json> summary;
  if (!ParseSummary(text, &summary)) {
    return MakeError(ExitCode::kData, "EVAL-FORMAT",
                     Printable(path) + ": line " + std::to_string(summary.size() + 1) +
                         " is no line of a summary; evaluate again");
  }
  return summary;
}

std::vector<ordered_json> WholeSummaryLines(const std::string& path) {
  std::vector<ordered_json> summary;
  const auto text = ReadFile(path);
  if (text.ok()) static_cast<void>(ParseSummary(*text, &summary));
  return summary;
}

}  // namespace sala::recipes
