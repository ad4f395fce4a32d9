// Plots of the report: training, HALO, evaluations, gates.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <tuple>

#include "core/statistics.h"
#include "recipes/report_page.h"
#include "recipes/report_svg.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

std::string PhaseOf(const json& line) {
  const std::string phase = ReportText(line, "phase");
  return phase == "train" ? "" : phase;
}

// Cross entropy of the next token, in nats per target; the other phases of HALO have other losses.
bool IsNextToken(const json& line) {
  const std::string phase = PhaseOf(line);
  return phase.empty() || phase == "finetune";
}

std::vector<PlotBand> Bands(const ReportData& data) {
  std::vector<PlotBand> bands;
  for (size_t s = 0; s < data.stages.size(); ++s) {
    const ReportStage& stage = data.stages[s];
    if (stage.last > 0)
      bands.push_back({static_cast<double>(stage.first) - 0.5,
                       static_cast<double>(stage.last) + 0.5, stage.name, static_cast<int>(s)});
  }
  return bands;
}

// The mean of each point and its neighbours, 1 % of the points to either side: what a noisy curve
// does.
std::vector<PlotPoint> Smoothed(const std::vector<PlotPoint>& points) {
  const auto n = static_cast<int64_t>(points.size());
  const int64_t reach = std::max<int64_t>(2, n / 100);
  std::vector<PlotPoint> smooth;
  for (int64_t i = 0; i < n; ++i) {
    // As far to the left as to the right, so that a slope is not bent at the ends.
    const int64_t to_side = std::min({reach, i, n - 1 - i});
    double sum = 0;
    for (int64_t j = i - to_side; j <= i + to_side; ++j) sum += points[static_cast<size_t>(j)].y;
    smooth.push_back(
        {points[static_cast<size_t>(i)].x, sum / static_cast<double>(2 * to_side + 1)});
  }
  return smooth;
}

using Wanted = std::function<bool(const json&)>;

// A value of the lines over the steps, a series for each stage and phase in the stage's colour.
std::vector<PlotSeries> ByStage(const ReportData& data, const std::vector<json>& lines,
                                const char* key, PlotSeries::Style style, const Wanted& wanted) {
  std::vector<PlotSeries> all;
  std::string last;
  for (const json& line : lines) {
    if (!wanted(line)) continue;
    const std::string stage = ReportText(line, "stage");
    const std::string place = stage + (PhaseOf(line).empty() ? "" : " " + PhaseOf(line));
    if (all.empty() || place != last) {
      all.push_back(
          {.name = place, .colour = static_cast<int>(data.StageOf(stage)), .style = style});
      last = place;
    }
    const double value = ReportNumber(line, key);
    if (std::isfinite(value)) all.back().points.push_back({ReportNumber(line, "step"), value});
  }
  return all;
}

// Long curves as a faint line under a smooth one.
void AddCurve(std::vector<PlotSeries> curve, std::vector<PlotSeries>* to) {
  constexpr size_t kLong = 60;
  for (PlotSeries& series : curve) {
    if (series.points.size() < kLong) {
      to->push_back(std::move(series));
      continue;
    }
    PlotSeries smooth = series;
    smooth.points = Smoothed(series.points);
    series.style = PlotSeries::Style::kFaint;
    series.name.clear();
    to->push_back(std::move(series));
    to->push_back(std::move(smooth));
  }
}

std::string Titled(const std::string& title, const std::string& plot) {
  return plot.empty() ? "" : "<div><h3>" + title + "</h3>" + plot + "</div>";
}

std::string LossPlot(const ReportData& data) {
  Plot plot = {.x_label = "step", .y_label = "loss, nats per token", .bands = Bands(data)};
  AddCurve(ByStage(data, data.train, "loss", PlotSeries::Style::kLine, IsNextToken), &plot.series);
  for (PlotSeries& series :
       ByStage(data, data.validation, "loss", PlotSeries::Style::kDots, IsNextToken)) {
    series.name += ", held out";
    plot.series.push_back(std::move(series));
  }
  // What distillation makes of the student, on the same scale.
  const auto distil = [](const json& line) { return PhaseOf(line) == "distil"; };
  for (PlotSeries& series :
       ByStage(data, data.validation, "student_loss", PlotSeries::Style::kDots, distil)) {
    series.name += ", student held out";
    plot.series.push_back(std::move(series));
  }
  return LinePlot(plot);
}

std::string ValuePlot(const ReportData& data, const char* key, const char* label, bool log,
                      bool zero) {
  Plot plot = {.x_label = "step",
               .y_label = label,
               .log_y = log,
               .zero = zero,
               .half = true,
               .bands = Bands(data)};
  AddCurve(
      ByStage(data, data.train, key, PlotSeries::Style::kLine, [](const json&) { return true; }),
      &plot.series);
  return LinePlot(plot);
}

std::string StepTimePlot(const ReportData& data) {
  static const std::array<std::pair<const char*, const char*>, 5> kParts = {
      {{"data_ms", "data"},
       {"forward_ms", "forward"},
       {"loss_ms", "loss"},
       {"backward_ms", "backward"},
       {"optim_ms", "optimizer"}}};
  StackedBars bars = {.unit = "milliseconds a step, medians"};
  for (const auto& [key, name] : kParts) bars.pieces.emplace_back(name);
  bars.pieces.emplace_back("other");
  std::vector<std::string> order;
  std::map<std::string, std::vector<std::vector<double>>> parts;
  for (const json& line : data.train) {
    const double whole = ReportNumber(line, "step_ms");
    std::vector<double> values;
    double sum = 0;
    for (const auto& [key, name] : kParts) {
      values.push_back(ReportNumber(line, key));
      sum += values.back();
    }
    if (!std::isfinite(sum) || !std::isfinite(whole)) continue;
    values.push_back(std::max(0.0, whole - sum));
    const std::string place =
        ReportText(line, "stage") + (PhaseOf(line).empty() ? "" : " " + PhaseOf(line));
    if (parts.count(place) == 0) {
      order.push_back(place);
      parts[place].resize(values.size());
    }
    for (size_t p = 0; p < values.size(); ++p) parts[place][p].push_back(values[p]);
  }
  for (const std::string& place : order) {
    std::vector<double> medians;
    for (const std::vector<double>& values : parts[place]) medians.push_back(Median(values));
    bars.bars.emplace_back(place, medians);
  }
  return StackedBarPlot(bars);
}

std::string Cell(double value, const char* format) {
  if (!std::isfinite(value)) return "<td>–</td>";
  std::array<char, 64> text{};
  const int n = std::snprintf(text.data(), text.size(), format, value);
  return "<td>" + std::string(text.data(), static_cast<size_t>(n)) + "</td>";
}

std::string ShareText(double share) {
  std::array<char, 32> text{};
  const int n = std::snprintf(text.data(), text.size(), "%.1f %%", 100 * share);
  return {text.data(), static_cast<size_t>(n)};
}

std::set<int64_t> LayersOf(const json& selection, const char* key) {
  std::set<int64_t> layers;
  const json list = selection.value(key, json::array());
  for (const json& layer : list) {
    if (layer.is_number_integer()) layers.insert(layer.get<int64_t>());
  }
  return layers;
}

// "layer 0", "layers 0, 3".
std::string LayerList(const std::set<int64_t>& layers) {
  if (layers.empty()) return "no layer";
  std::string text;
  for (const int64_t layer : layers) text += (text.empty() ? " " : ", ") + std::to_string(layer);
  return (layers.size() == 1 ? "layer" : "layers") + text;
}

}  // namespace

std::string TrainingSection(const ReportData& data) {
  const std::string curves =
      Titled("Learning rate", ValuePlot(data, "lr", "learning rate", false, true)) +
      Titled("Gradient norm",
             ValuePlot(data, "grad_norm", "norm before clipping, log scale", true, false)) +
      Titled("Throughput", ValuePlot(data, "tokens_per_s", "tokens a second", false, true)) +
      Titled("Padding",
             ValuePlot(data, "padding_share", "share of the slots of a batch", false, true));
  return ReportSection("Loss",
                       "Training loss and held-out loss over all stages, on one scale where the "
                       "loss is that of the next token.",
                       LossPlot(data)) +
         ReportSection("Training", "Over the steps of all stages.",
                       curves.empty() ? "" : "<div class=\"grid2 quiet\">" + curves + "</div>") +
         ReportSection(
             "Where a step's time goes",
             "On rank 0. On a GPU these are the times of the host, which queues the work.",
             StepTimePlot(data));
}

std::string HaloSection(const ReportData& data) {
  std::string body;
  const auto phase = [](const char* name) {
    return [name](const json& line) { return PhaseOf(line) == name; };
  };
  const auto curve = [&](const char* name, const char* key, const char* train_key,
                         const char* label) {
    Plot plot = {.x_label = "step", .y_label = label, .half = true};
    AddCurve(ByStage(data, data.train, train_key, PlotSeries::Style::kLine, phase(name)),
             &plot.series);
    for (PlotSeries& series :
         ByStage(data, data.validation, key, PlotSeries::Style::kDots, phase(name))) {
      series.name += ", held out";
      plot.series.push_back(std::move(series));
    }
    return LinePlot(plot);
  };
  const std::string curves =
      Titled("Alignment", curve("align", "relative_error", "relative_error",
                                "squared error over variance of the target, mean of layers")) +
      Titled("Distillation", curve("distil", "kl", "loss", "KL from the teacher, nats per token"));
  if (!curves.empty()) body += "<div class=\"grid2\">" + curves + "</div>";
  if (!data.selection.is_object()) return ReportSection("HALO conversion", "", body);

  const std::set<int64_t> kept = LayersOf(data.selection, "softmax_layers");
  const std::set<int64_t> forced = LayersOf(data.selection, "forced");
  body += "<h3>Which layers keep softmax attention</h3><p class=\"lead\">Selector <b>" +
          EscapeHtml(ReportText(data.selection, "selector")) + "</b> keeps softmax in " +
          LayerList(kept) +
          (forced.empty() ? "" : ", " + LayerList(forced) + " by decision (halo.keep)") +
          ". A score says how much is lost when only this layer becomes linear; the share, in how "
          "many resamples of the scored items the layer would be kept. Layers are chosen by the "
          "score over all items; where the shares of two are near, that was a close choice.</p>";
  const json scores = data.selection.value("scores", json::object());
  const json layers = scores.is_object() ? scores.value("layers", json::array()) : json::array();
  LayerBars keep = {.y_label = "score", .half = true};
  LayerBars share = {.y_label = "kept in this share of resamples", .share = true, .half = true};
  std::string rows;
  bool shares = false;
  for (size_t l = 0; layers.is_array() && l < layers.size(); ++l) {
    const json& row = layers[l];
    const bool marked = kept.count(static_cast<int64_t>(l)) > 0;
    keep.values.push_back(ReportNumber(row, "keep_score"));
    keep.marked.push_back(marked);
    share.values.push_back(ReportNumber(row, "bootstrap_keep_share"));
    share.marked.push_back(marked);
    shares = shares || std::isfinite(share.values.back());
    rows += "<tr><td>" + std::to_string(l) + "</td><td class=\"text\">" +
            (marked ? "softmax" : "linear") + "</td>" + Cell(keep.values.back(), "%.4g") +
            Cell(100 * share.values.back(), "%.0f %%") + Cell(ReportNumber(row, "recall"), "%.4f") +
            Cell(100 * ReportNumber(row, "exact"), "%.0f %%") +
            Cell(ReportNumber(row, "text"), "%.4f") + Cell(ReportNumber(row, "kl"), "%.4f") +
            "</tr>";
  }
  if (keep.values.empty()) return ReportSection("HALO conversion", "", body);
  body += "<div class=\"grid2\"><div>" + LayerBarPlot(keep) + "</div><div>" +
          (shares ? LayerBarPlot(share) : "") +
          "</div></div><div class=\"legend\"><span><i class=\"key square\" "
          "style=\"border-color:var(--c1)\"></i>keeps softmax attention</span><span><i class=\"key "
          "square\" style=\"border-color:var(--c8)\"></i>becomes linear</span></div>"
          "<details><summary>All scores</summary><div class=\"scroll\"><table><tr><th>layer</th>"
          "<th class=\"text\">mixer</th><th>score</th><th>kept in</th><th>recall</th><th>exact</th>"
          "<th>text</th><th>KL</th></tr>" +
          rows + "</table></div></details>";
  return ReportSection("HALO conversion",
                       "From a full-attention teacher to a hybrid: every layer's linear mixer is "
                       "aligned, layers are scored, the hybrid is distilled.",
                       body);
}

namespace {

// Depth by length of one task at one moment.
std::string RecallMap(const std::vector<const json*>& lines) {
  std::map<int64_t, std::map<int64_t, std::pair<double, std::string>>> by_depth;
  std::map<int64_t, std::string> depth_names;
  std::set<int64_t> lengths;
  for (const json* line : lines) {
    const double length = ReportNumber(*line, "length");
    if (!std::isfinite(length) || !line->contains("depths") || !(*line)["depths"].is_array())
      continue;
    const auto column = static_cast<int64_t>(length);
    lengths.insert(column);
    for (const json& depth : (*line)["depths"]) {
      const double from = ReportNumber(depth, "from");
      const double to = ReportNumber(depth, "to");
      const double right = ReportNumber(depth, "right");
      const double count = ReportNumber(depth, "count");
      if (!std::isfinite(from) || !(count > 0) || !std::isfinite(right)) continue;
      // Depths are shares of the length, or percent; thousandths tell them apart in either case.
      const auto row = static_cast<int64_t>(std::llround(1000 * from));
      const double percent = to <= 1 ? 100 : 1;
      depth_names[row] = TickText(percent * from, 1) + "–" + TickText(percent * to, 1) + " %";
      by_depth[row][column] = {right / count, TickText(right, 1) + " of " + TickText(count, 1)};
    }
  }
  HeatMap map = {.half = true, .x_label = "length, tokens", .y_label = "depth of the needle"};
  for (const int64_t length : lengths)
    map.columns.push_back(length % 1024 == 0 ? std::to_string(length / 1024) + "K"
                                             : TickText(static_cast<double>(length), 1));
  for (const auto& [row, cells] : by_depth) {
    map.rows.push_back(depth_names[row]);
    map.values.emplace_back();
    map.notes.emplace_back();
    for (const int64_t length : lengths) {
      const auto cell = cells.find(length);
      map.values.back().push_back(cell == cells.end() ? std::nan("") : cell->second.first);
      map.notes.back().push_back(cell == cells.end() ? "not measured"
                                                     : cell->second.second + " right");
    }
  }
  return HeatMapPlot(map);
}

std::string RecallRow(const json& line) {
  std::string interval = "–";
  if (line.contains("interval") && line["interval"].is_array() && line["interval"].size() == 2 &&
      line["interval"][0].is_number() && line["interval"][1].is_number())
    interval = ShareText(line["interval"][0].get<double>()) + " to " +
               ShareText(line["interval"][1].get<double>());
  return "<tr><td class=\"text\">" + EscapeHtml(ReportText(line, "task")) + "</td>" +
         Cell(ReportNumber(line, "length"), "%.0f") + "<td class=\"text\">" +
         EscapeHtml(ReportText(line, "when") + " " + ReportText(line, "stage")) + "</td>" +
         Cell(ReportNumber(line, "right"), "%.0f") + Cell(ReportNumber(line, "count"), "%.0f") +
         Cell(100 * ReportNumber(line, "share"), "%.1f %%") + "<td>" + interval + "</td>" +
         Cell(ReportNumber(line, "mean_log_probability"), "%.3f") + "</tr>";
}

std::string PositionPlot(const ReportData& data) {
  Plot plot = {.x_label = "position in the document, tokens",
               .y_label = "loss, nats per token",
               .log_x = true};
  for (const json& line : data.evaluations) {
    if (ReportText(line, "task") != "loss_by_position" || !line.contains("buckets") ||
        !line["buckets"].is_array())
      continue;
    const std::string stage = ReportText(line, "stage");
    const bool before = ReportText(line, "when") == "before";
    PlotSeries series = {.name = ReportText(line, "when") + " " + stage + ", " +
                                 TickText(ReportNumber(line, "length"), 1) + " tokens",
                         .colour = static_cast<int>(data.StageOf(stage)),
                         .style = before ? PlotSeries::Style::kDashed : PlotSeries::Style::kLine};
    for (const json& bucket : line["buckets"]) {
      // The middle of the bucket; the first position is 1 on a logarithmic axis.
      const double middle = (ReportNumber(bucket, "from") + ReportNumber(bucket, "to")) / 2 + 1;
      const double loss = ReportNumber(bucket, "loss");
      if (std::isfinite(middle) && std::isfinite(loss)) series.points.push_back({middle, loss});
    }
    plot.series.push_back(std::move(series));
  }
  return LinePlot(plot);
}

}  // namespace

std::string EvaluationSection(const ReportData& data) {
  // By task, then by step and moment.
  using Moment = std::tuple<int64_t, std::string, std::string>;
  std::map<std::string, std::map<Moment, std::vector<const json*>>> tasks;
  std::string rows;
  for (const json& line : data.evaluations) {
    const std::string task = ReportText(line, "task");
    if (task == "loss_by_position") continue;
    const double step = ReportNumber(line, "step");
    tasks[task][{std::isfinite(step) ? static_cast<int64_t>(step) : 0, ReportText(line, "when"),
                 ReportText(line, "stage")}]
        .push_back(&line);
    rows += RecallRow(line);
  }
  std::string body;
  for (const auto& [task, moments] : tasks) {
    std::string maps;
    for (const auto& [moment, lines] : moments)
      maps += Titled(EscapeHtml(task + ", " + std::get<1>(moment) + " " + std::get<2>(moment)),
                     RecallMap(lines));
    if (!maps.empty()) body += "<div class=\"grid2\">" + maps + "</div>";
  }
  if (!rows.empty())
    body +=
        "<details><summary>All numbers</summary><div class=\"scroll\"><table><tr><th "
        "class=\"text\">task</th><th>length</th><th class=\"text\">when</th><th>right</th>"
        "<th>of</th><th>share</th><th>interval</th><th>log probability</th></tr>" +
        rows + "</table></div></details>";
  return ReportSection("Recall", "Share of right answers by length and by where the answer stands.",
                       body) +
         ReportSection("Loss by position", "Of held-out documents; dashed before the stage.",
                       PositionPlot(data));
}

std::string GateSection(const ReportData& data) {
  HeatMap map = {.x_label = "layer", .y_label = "mean of the output gate after the stage"};
  size_t layers = 0;
  for (const json& line : data.gates) layers = std::max(layers, line["means"].size());
  for (size_t l = 0; l < layers; ++l) map.columns.push_back(std::to_string(l));
  for (const json& line : data.gates) {
    map.rows.push_back(ReportText(line, "stage"));
    map.values.emplace_back(layers, std::nan(""));
    map.notes.emplace_back(layers, "no gate");
    for (size_t l = 0; l < line["means"].size(); ++l) {
      if (!line["means"][l].is_number()) continue;
      const double mean = line["means"][l].get<double>();
      map.values.back()[l] = mean;
      std::string mixer;
      if (line.contains("mixers") && line["mixers"].is_array() && l < line["mixers"].size() &&
          line["mixers"][l].is_string())
        mixer = line["mixers"][l].get<std::string>() + ": ";
      map.notes.back()[l] = mixer + TickText(mean, 0.001);
    }
  }
  return ReportSection("Output gates",
                       "Mean of sigmoid(z) over a few held-out tokens: 0 closes a layer's mixer, 1 "
                       "lets all of it through; an empty cell has no gate.",
                       HeatMapPlot(map));
}

}  // namespace sala::recipes
