#include "recipes/report_page.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <ctime>

#include "core/json.h"
#include "core/progress.h"
#include "recipes/report_svg.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

std::string Formatted(const char* format, double value) {
  if (!std::isfinite(value)) return "–";
  std::array<char, 64> text{};
  const int n = std::snprintf(text.data(), text.size(), format, value);
  return {text.data(), static_cast<size_t>(n)};
}

std::string Count(double value) { return std::isfinite(value) ? TickText(value, 1) : "–"; }

std::string TimeText(double seconds) {
  if (!(seconds > 0) || seconds > 1e11) return "–";
  const auto time = static_cast<std::time_t>(seconds);
  std::tm utc{};
  gmtime_r(&time, &utc);
  std::array<char, 32> text{};
  const size_t n = std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S", &utc);
  return {text.data(), n};
}

std::string Fact(const std::string& name, const std::string& value) {
  return "<div><b>" + EscapeHtml(value) + "</b><span>" + EscapeHtml(name) + "</span></div>";
}

std::string Chip(size_t stage) {
  return "<i class=\"chip\" style=\"background:var(--c" + std::to_string(stage % 10) + ")\"></i>";
}

// Steps of a stage that are done: all up to its last line, counted from its first step.
int64_t StepsDone(const ReportStage& stage) {
  return stage.last == 0 ? 0 : stage.last - stage.first + 1;
}

std::string Header(const ReportData& data) {
  const std::string state = ReportText(data.status, "state");
  const std::string css = !data.gone.empty()                                            ? "failed"
                          : state == "done" || state == "failed" || state == "stopping" ? state
                                                                                        : "live";
  const json none;
  const json& last = data.train.empty() ? none : data.train.back();
  std::string bar;
  int64_t all = 0;
  int64_t done = 0;
  for (const ReportStage& stage : data.stages) {
    all += std::max(stage.steps, StepsDone(stage));
    done += StepsDone(stage);
  }
  for (size_t s = 0; s < data.stages.size() && all > 0; ++s) {
    bar += "<i style=\"width:" +
           Formatted("%.2f", 100.0 * static_cast<double>(StepsDone(data.stages[s])) /
                                 static_cast<double>(all)) +
           "%;background:var(--c" + std::to_string(s % 10) + ")\" title=\"" +
           EscapeHtml(data.stages[s].name) + "\"></i>";
  }
  std::string facts;
  if (const std::string stage = ReportText(data.status, "stage"); !stage.empty())
    facts += Fact("stage", stage);
  facts +=
      Fact("steps", Count(static_cast<double>(done)) + " of " + Count(static_cast<double>(all)));
  if (last.is_object()) {
    const std::string phase = ReportText(last, "phase");
    facts += Fact(phase.empty() || phase == "train" ? "training loss" : "loss of " + phase,
                  Formatted("%.4f", ReportNumber(last, "loss")));
  }
  for (auto line = data.validation.rbegin(); line != data.validation.rend(); ++line) {
    if (!std::isfinite(ReportNumber(*line, "perplexity"))) continue;
    facts += Fact("held-out loss", Formatted("%.4f", ReportNumber(*line, "loss")));
    break;
  }
  facts += Fact("tokens a second", Count(std::round(ReportNumber(last, "tokens_per_s"))));
  if (std::isfinite(ReportNumber(last, "gflop_per_s")))
    facts += Fact("GFLOP/s of rank 0", Formatted("%.1f", ReportNumber(last, "gflop_per_s")));
  if (data.live()) facts += Fact("left in this phase", DurationText(ReportNumber(last, "eta_s")));
  if (!data.gone.empty()) facts += Fact("ended without a word", data.gone);
  if (!data.resumes.empty()) facts += Fact("restarts", std::to_string(data.resumes.size()));
  return "<header class=\"top\"><div class=\"row\"><h1>" + EscapeHtml(data.name) +
         "</h1><span class=\"state " + css + "\">" +
         EscapeHtml((state.empty() ? "no status" : state) + (data.gone.empty() ? "" : ", killed")) +
         "</span></div><p class=\"lead\" style=\"margin:4px 0 0\">" + EscapeHtml(data.directory) +
         ", last change " + TimeText(ReportNumber(data.status, "time")) +
         " UTC</p><div class=\"bar\">" + bar + "</div><div class=\"facts\">" + facts +
         "</div></header>\n";
}

std::string StageTable(const ReportData& data) {
  std::string rows;
  for (size_t s = 0; s < data.stages.size(); ++s) {
    const ReportStage& stage = data.stages[s];
    const json* row = nullptr;
    if (data.summary.is_array()) {
      for (const json& each : data.summary) {
        if (ReportText(each, "stage") == stage.name) row = &each;
      }
    }
    const json none;
    const json& summary = row == nullptr ? none : *row;
    const double tokens = ReportNumber(summary, "tokens");
    const double seconds = ReportNumber(summary, "seconds");
    rows +=
        "<tr><td class=\"text\">" + Chip(s) + EscapeHtml(stage.name) + "</td><td class=\"text\">" +
        EscapeHtml(stage.kind) + "</td><td>" + Count(static_cast<double>(StepsDone(stage))) +
        " / " + Count(static_cast<double>(stage.steps)) + "</td><td>" + Count(tokens) +
        "</td><td>" + Formatted("%.4f", ReportNumber(summary, "loss_before")) + "</td><td>" +
        Formatted("%.4f", ReportNumber(summary, "loss_after")) + "</td><td>" +
        Count(std::round(tokens / seconds)) + "</td><td>" +
        (std::isfinite(seconds) ? DurationText(seconds) : "–") + "</td><td class=\"text wrap\">" +
        EscapeHtml(ReportText(summary, "note")) + "</td></tr>";
  }
  if (rows.empty()) return "";
  return "<div class=\"scroll\"><table><tr><th class=\"text\">stage</th><th "
         "class=\"text\">kind</th>"
         "<th>steps</th><th>tokens</th><th>loss before</th><th>loss after</th><th>tokens/s</th>"
         "<th>time</th><th class=\"text\">note</th></tr>" +
         rows + "</table></div>";
}

std::string CheckpointTable(const ReportData& data) {
  std::string rows;
  for (const ReportCheckpoint& checkpoint : data.checkpoints) {
    rows += "<tr><td class=\"text\">" + EscapeHtml(checkpoint.name) + "</td><td class=\"text\">" +
            Chip(data.StageOf(checkpoint.stage)) + EscapeHtml(checkpoint.stage) +
            "</td><td class=\"text\">" + (checkpoint.stage_final ? "result of the stage" : "") +
            "</td><td>" + Formatted("%.2f MiB", static_cast<double>(checkpoint.bytes) / (1 << 20)) +
            "</td></tr>";
  }
  if (rows.empty()) return "";
  return "<div class=\"scroll\"><table><tr><th class=\"text\">checkpoint</th><th "
         "class=\"text\">stage</th><th class=\"text\"></th><th>size</th></tr>" +
         rows + "</table></div>";
}

std::string Environment(const ReportData& data) {
  if (!data.environment.is_object()) return "";
  std::string list;
  for (const auto& [key, value] : data.environment.items()) {
    std::string text = value.is_string() ? value.get<std::string>()
                       : key == "time"   ? TimeText(ReportNumber(data.environment, "time")) + " UTC"
                                         : DumpJson(value);
    std::string name = key == "time" ? "started" : key;
    std::replace(name.begin(), name.end(), '_', ' ');
    list += "<dt>" + EscapeHtml(name) + "</dt><dd>" + EscapeHtml(text) + "</dd>";
  }
  return "<dl>" + list + "</dl>";
}

std::string Warnings(const ReportData& data) {
  std::string list;
  for (const std::string& warning : data.warnings) list += "<li>" + EscapeHtml(warning) + "</li>";
  if (list.empty()) return "";
  return (data.warnings_left_out > 0
              ? "<p class=\"lead\">" + std::to_string(data.warnings_left_out) +
                    " older ones are left out.</p>"
              : "") +
         "<ul class=\"log\">" + list + "</ul>";
}

std::string Configuration(const ReportData& data) {
  std::string body;
  for (const auto& [file, text] : data.configuration)
    body += "<details><summary>" + EscapeHtml(file) + "</summary><pre>" + EscapeHtml(text) +
            "</pre></details>";
  return body;
}

std::string Notes(const ReportData& data) {
  std::string list;
  for (const std::string& note : data.notes) list += "<li>" + EscapeHtml(note) + "</li>";
  return list.empty() ? "" : "<ul>" + list + "</ul>";
}

}  // namespace

std::string ReportSection(const std::string& title, const std::string& lead,
                          const std::string& body) {
  if (body.empty()) return "";
  return "<section><h2>" + title + "</h2><p class=\"lead\">" + lead + "</p>" + body +
         "</section>\n";
}

std::string ReportPage(const ReportData& data, int64_t refresh_seconds) {
  std::string page =
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">";
  if (refresh_seconds > 0 && data.live())
    page += "<meta http-equiv=\"refresh\" content=\"" + std::to_string(refresh_seconds) + "\">";
  page += "<title>" + EscapeHtml(data.name) + "</title><style>" + kReportStyle +
          "</style></head><body><main>\n";
  page += Header(data);
  page += ReportSection("Not shown", "What of the run directory could not be read.", Notes(data));
  page +=
      ReportSection("Stages", "Losses are on held-out text where there is any.", StageTable(data));
  page += TrainingSection(data);
  page += HaloSection(data);
  page += EvaluationSection(data);
  page += GateSection(data);
  page += ReportSection("Checkpoints", "Those that are kept now.", CheckpointTable(data));
  page += ReportSection("Warnings and errors", "From the logs of all ranks.", Warnings(data));
  page += ReportSection("Environment", "Of the last start.", Environment(data));
  page +=
      ReportSection("Configuration", "Of the last start, with all defaults.", Configuration(data));
  page += "<footer>Written by sala report, " + TimeText(static_cast<double>(std::time(nullptr))) +
          " UTC.</footer></main>\n<script>" + kReportScript + "</script></body></html>\n";
  return page;
}

}  // namespace sala::recipes
