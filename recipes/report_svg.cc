#include "recipes/report_svg.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "core/elementary.h"
#include "core/json.h"
#include "nlohmann/json.hpp"

namespace sala::recipes {
namespace {

constexpr int64_t kBuckets = 240;  // along x, at most four points each

std::string Number(double value) {
  std::array<char, 32> text{};
  const int n = std::snprintf(text.data(), text.size(), "%.2f", value);
  return {text.data(), static_cast<size_t>(n)};
}

std::string Attribute(const char* name, double value) {
  return std::string(" ") + name + "=\"" + Number(value) + "\"";
}

std::string Text(double x, double y, const std::string& text, const char* css) {
  return "<text class=\"" + std::string(css) + "\"" + Attribute("x", x) + Attribute("y", y) + ">" +
         EscapeHtml(text) + "</text>";
}

std::string Line(double x1, double y1, double x2, double y2, const char* css) {
  return "<line class=\"" + std::string(css) + "\"" + Attribute("x1", x1) + Attribute("y1", y1) +
         Attribute("x2", x2) + Attribute("y2", y2) + "/>";
}

std::string Box(double x, double y, double width, double height, const std::string& attributes,
                const std::string& note = "") {
  return "<rect" + Attribute("x", x) + Attribute("y", y) + Attribute("width", width) +
         Attribute("height", height) + " " + attributes +
         (note.empty() ? "/>" : "><title>" + EscapeHtml(note) + "</title></rect>");
}

std::string Colour(int colour) {
  return colour < 0 ? "var(--ink2)" : "var(--c" + std::to_string(colour % 10) + ")";
}

// Of system-ui text at 11 px; a little more than the average letter, so that nothing overlaps.
double TextWidth(const std::string& text) { return 6.4 * static_cast<double>(text.size()); }

std::string Svg(const char* css, double width, double height, const std::string& attributes,
                const std::string& body) {
  return "<svg class=\"" + std::string(css) + "\" viewBox=\"0 0 " + Number(width) + " " +
         Number(height) + "\" role=\"img\" " + attributes + ">" + body + "</svg>";
}

// Both forms of a plot, in about as many units as pixels it gets, so that letters have one size.
template <typename Draw>
std::string WideAndNarrow(bool half, const Draw& draw) {
  return draw("wide", half ? 520.0 : 1080.0) + draw("narrow", 340.0);
}

class Axis {
 public:
  Axis(double low, double high, double from, double to, bool log)
      : low_(Value(low, log)), high_(Value(high, log)), from_(from), to_(to), log_(log) {
    if (!(high_ > low_)) high_ = low_ + 1;
  }
  double operator()(double value) const {
    return from_ + (Value(value, log_) - low_) / (high_ - low_) * (to_ - from_);
  }

 private:
  static double Value(double value, bool log) { return log ? PortableLog(value) : value; }
  double low_, high_, from_, to_;
  bool log_;
};

struct Range {
  double low = HUGE_VAL, high = -HUGE_VAL;
  void Add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

std::string SeriesShape(const PlotSeries& series, const Axis& x, const Axis& y) {
  const std::string colour = Colour(series.colour);
  std::string shape;
  if (series.style == PlotSeries::Style::kDots) {
    for (const PlotPoint& p : series.points)
      shape += "<circle r=\"2.6\" style=\"fill:var(--bg);stroke:" + colour +
               "\" stroke-width=\"1.6\"" + Attribute("cx", x(p.x)) + Attribute("cy", y(p.y)) + "/>";
    return shape;
  }
  std::string path;
  for (const PlotPoint& p : series.points)
    path += (path.empty() ? "M" : "L") + Number(x(p.x)) + " " + Number(y(p.y));
  // A single point has no line.
  if (series.points.size() == 1) path += "h0.01";
  const char* css = series.style == PlotSeries::Style::kFaint    ? "line faint"
                    : series.style == PlotSeries::Style::kDashed ? "line dashed"
                                                                 : "line";
  return "<path class=\"" + std::string(css) + "\" style=\"stroke:" + colour + "\" d=\"" + path +
         "\"/>";
}

// What the page's script needs to show values: {"x": label, "series": [{"n", "c", "p": [[x, y]]}]}.
std::string PlotData(const Plot& plot) {
  auto series = nlohmann::json::array();
  for (const PlotSeries& each : plot.series) {
    auto points = nlohmann::json::array();
    for (const PlotPoint& p : each.points) points.push_back({p.x, p.y});
    series.push_back({{"n", each.name}, {"c", Colour(each.colour)}, {"p", points}});
  }
  const nlohmann::json data = {{"x", plot.x_label}, {"series", series}};
  return EscapeHtml(DumpJson(data));
}

std::string DrawLinePlot(const Plot& plot, const Range& xs, const std::vector<double>& x_ticks,
                         const std::vector<double>& y_ticks, const char* css, double width) {
  const bool narrow = width < 600;
  const double y_spacing = plot.log_y ? y_ticks.front() : y_ticks[1] - y_ticks[0];
  double left = 0;
  for (const double tick : y_ticks)
    left = std::max(left, TextWidth(TickText(tick, plot.log_y ? tick : y_spacing)));
  left += 14;
  const double right = width - 10;
  const double top = plot.bands.empty() ? 20 : 38;
  const double bottom = (narrow ? 230 : 290) - 36;
  const Axis x(xs.low, xs.high, left, right, plot.log_x);
  const Axis y(y_ticks.front(), y_ticks.back(), bottom, top, plot.log_y);
  std::string body;
  for (const PlotBand& band : plot.bands) {
    const double from = std::clamp(x(band.from), left, right);
    const double to = std::clamp(x(band.to), left, right);
    if (to - from < 0.5) continue;
    body += Box(from, top, to - from, bottom - top,
                "class=\"band\" style=\"fill:" + Colour(band.colour) + "\"", band.name);
    body += Box(from + 0.75, top - 4, std::max(0.5, to - from - 1.5), 4,
                "rx=\"1\" style=\"fill:" + Colour(band.colour) + "\"", band.name);
    if (TextWidth(band.name) <= to - from)
      body += Text((from + to) / 2, top - 9, band.name, "mid tick");
  }
  for (const double tick : y_ticks) {
    body += Line(left, y(tick), right, y(tick), "grid");
    body +=
        Text(left - 6, y(tick) + 3.8, TickText(tick, plot.log_y ? tick : y_spacing), "end tick");
  }
  const double x_spacing = plot.log_x || x_ticks.size() < 2 ? 1 : x_ticks[1] - x_ticks[0];
  double last_end = 0;
  for (const double tick : x_ticks) {
    if (tick < xs.low || tick > xs.high) continue;
    const std::string text = TickText(tick, x_spacing);
    const double half = TextWidth(text) / 2;
    const double centre = std::min(x(tick), width - half);
    body += Line(x(tick), bottom, x(tick), bottom + 4, "axis");
    if (centre - half < last_end) continue;
    last_end = centre + half + 8;
    body += Text(centre, bottom + 17, text, "mid tick");
  }
  body += Line(left, bottom, right, bottom, "axis");
  body += Text((left + right) / 2, bottom + 33, plot.x_label, "mid label");
  body += Text(0, 11, plot.y_label, "label");
  for (const PlotSeries& series : plot.series) body += SeriesShape(series, x, y);
  body += "<line class=\"cursor\" visibility=\"hidden\"" + Attribute("y1", top) +
          Attribute("y2", bottom) + "/>";
  const double low = plot.log_x ? PortableLog(xs.low) : xs.low;
  const double high = plot.log_x ? PortableLog(xs.high) : xs.high;
  std::array<char, 64> bounds{};
  std::snprintf(bounds.data(), bounds.size(), "%.9g %.9g", low, high);
  const std::string attributes = "data-box=\"" + Number(left) + " " + Number(right) +
                                 "\" data-range=\"" + bounds.data() + "\" data-log=\"" +
                                 (plot.log_x ? "1" : "0") + "\" aria-label=\"" +
                                 EscapeHtml(plot.y_label) + "\"";
  return Svg(css, width, narrow ? 230 : 290, attributes, body);
}

}  // namespace

std::string LinePlot(const Plot& given) {
  Plot plot = given;
  Range xs, ys;
  for (PlotSeries& series : plot.series) {
    std::erase_if(series.points, [&plot](const PlotPoint& p) {
      return (plot.log_y && !(p.y > 0)) || (plot.log_x && !(p.x > 0));
    });
    series.points = Downsample(series.points, kBuckets);
    for (const PlotPoint& p : series.points) {
      xs.Add(p.x);
      ys.Add(p.y);
    }
  }
  std::erase_if(plot.series, [](const PlotSeries& series) { return series.points.empty(); });
  if (plot.series.empty()) return "";
  for (const PlotBand& band : plot.bands) {
    xs.Add(band.from);
    xs.Add(band.to);
  }
  if (plot.zero) ys.Add(0);
  if (!(xs.high > xs.low)) xs.high = xs.low + 1;
  const std::vector<double> y_ticks = plot.log_y
                                          ? LogTicks(ys.low, std::max(ys.high, ys.low * 1.0001))
                                          : NiceTicks(ys.low, ys.high, 5);
  std::string names;
  bool held_out = false;
  for (const PlotSeries& series : plot.series) {
    const bool dots = series.style == PlotSeries::Style::kDots;
    held_out = held_out || dots;
    if (series.style == PlotSeries::Style::kFaint || series.name.empty() || dots) continue;
    names += "<span><i class=\"" +
             std::string(series.style == PlotSeries::Style::kDashed ? "key dashed" : "key") +
             "\" style=\"border-color:" + Colour(series.colour) + "\"></i>" +
             EscapeHtml(series.name) + "</span>";
  }
  if (held_out)
    names += "<span><i class=\"key dots\" style=\"border-color:var(--ink2)\"></i>held out</span>";
  const std::string drawn = WideAndNarrow(plot.half, [&](const char* css, double width) {
    const std::vector<double> x_ticks =
        plot.log_x ? LogTicks(xs.low, xs.high) : NiceTicks(xs.low, xs.high, width < 500 ? 4 : 9);
    return DrawLinePlot(plot, xs, x_ticks, y_ticks, css, width);
  });
  return "<div class=\"plot\" data-plot=\"" + PlotData(plot) + "\">" + drawn +
         "<div class=\"legend\">" + names + "</div></div>\n";
}

std::string HeatMapPlot(const HeatMap& map) {
  if (map.rows.empty() || map.columns.empty()) return "";
  double left = 0;
  for (const std::string& row : map.rows) left = std::max(left, TextWidth(row));
  left += 12;
  const auto draw = [&](const char* css, double width) {
    const double cell =
        std::min(92.0, (width - left - 4) / static_cast<double>(map.columns.size()));
    const double height = 26;
    const double top = 20;
    std::string body = Text(0, 11, map.y_label, "label");
    for (size_t r = 0; r < map.rows.size(); ++r) {
      const double y = top + height * static_cast<double>(r);
      body += Text(left - 8, y + 17, map.rows[r], "end tick");
      for (size_t c = 0; c < map.columns.size(); ++c) {
        const double value = map.values[r][c];
        const double x = left + cell * static_cast<double>(c);
        if (!std::isfinite(value)) {
          body +=
              Box(x + 1, y + 1, cell - 2, height - 2, "rx=\"3\" class=\"none\"", map.notes[r][c]);
          continue;
        }
        const double shown = std::clamp(value, 0.0, 1.0);
        body += Box(x + 1, y + 1, cell - 2, height - 2,
                    "rx=\"3\" style=\"fill:color-mix(in srgb,var(--hot) " + Number(100 * shown) +
                        "%,var(--cold))\"",
                    map.notes[r][c]);
        if (cell >= 30)
          body +=
              Text(x + cell / 2, y + 17, Number(value), shown > 0.55 ? "mid cell hi" : "mid cell");
      }
    }
    const double bottom = top + height * static_cast<double>(map.rows.size());
    double last_end = 0;
    for (size_t c = 0; c < map.columns.size(); ++c) {
      const double x = left + cell * (static_cast<double>(c) + 0.5);
      const double half = TextWidth(map.columns[c]) / 2;
      if (x - half < last_end) continue;
      last_end = x + half + 4;
      body += Text(x, bottom + 15, map.columns[c], "mid tick");
    }
    body += Text(left + cell * static_cast<double>(map.columns.size()) / 2, bottom + 32,
                 map.x_label, "mid label");
    return Svg(css, width, bottom + 38, "aria-label=\"" + EscapeHtml(map.y_label) + "\"", body);
  };
  return "<div class=\"plot\">" + WideAndNarrow(map.half, draw) + "</div>\n";
}

std::string StackedBarPlot(const StackedBars& bars) {
  double most = 0;
  double left = 0;
  for (const auto& [name, values] : bars.bars) {
    double sum = 0;
    for (const double value : values) sum += std::isfinite(value) ? value : 0;
    most = std::max(most, sum);
    left = std::max(left, TextWidth(name));
  }
  if (!(most > 0)) return "";
  left += 12;
  const std::vector<double> ticks = NiceTicks(0, most, 6);
  const auto draw = [&](const char* css, double width) {
    const Axis x(0, ticks.back(), left, width - 16, false);
    const double height = 30;
    const double bottom = 8 + height * static_cast<double>(bars.bars.size());
    std::string body;
    double last_end = 0;
    for (const double tick : ticks) {
      body += Line(x(tick), 4, x(tick), bottom, "grid");
      const std::string text = TickText(tick, ticks[1]);
      if (x(tick) - TextWidth(text) / 2 < last_end) continue;
      last_end = x(tick) + TextWidth(text) / 2 + 8;
      body += Text(x(tick), bottom + 15, text, "mid tick");
    }
    for (size_t b = 0; b < bars.bars.size(); ++b) {
      const auto& [name, values] = bars.bars[b];
      const double y = 8 + height * static_cast<double>(b);
      body += Text(left - 8, y + 15, name, "end tick");
      double from = 0;
      for (size_t p = 0; p < values.size(); ++p) {
        if (!(values[p] > 0)) continue;
        body += Box(x(from), y + 2, std::max(0.3, x(from + values[p]) - x(from)), height - 10,
                    "style=\"fill:" + Colour(static_cast<int>(p)) + "\"",
                    name + ", " + bars.pieces[p] + ": " + Number(values[p]) + " " + bars.unit);
        from += values[p];
      }
    }
    body += Text((left + width) / 2, bottom + 32, bars.unit, "mid label");
    return Svg(css, width, bottom + 38, "", body);
  };
  std::string names;
  for (size_t p = 0; p < bars.pieces.size(); ++p)
    names += "<span><i class=\"key square\" style=\"border-color:" + Colour(static_cast<int>(p)) +
             "\"></i>" + EscapeHtml(bars.pieces[p]) + "</span>";
  return "<div class=\"plot\">" + WideAndNarrow(false, draw) + "<div class=\"legend\">" + names +
         "</div></div>\n";
}

std::string LayerBarPlot(const LayerBars& bars) {
  Range range;
  range.Add(0);
  for (const double value : bars.values) {
    if (std::isfinite(value)) range.Add(value);
  }
  if (bars.values.empty() || (!bars.share && !(range.high > range.low))) return "";
  if (bars.share) range.high = 1;
  const std::vector<double> ticks = NiceTicks(range.low, range.high, 4);
  const auto draw = [&](const char* css, double width) {
    double left = 0;
    for (const double tick : ticks)
      left = std::max(left, TextWidth(TickText(tick, ticks[1] - ticks[0])));
    left += 14;
    const double top = 20;
    const double bottom = 150;
    const Axis y(ticks.front(), ticks.back(), bottom, top, false);
    const double step =
        std::min(64.0, (width - left - 8) / static_cast<double>(bars.values.size()));
    const double right = left + step * static_cast<double>(bars.values.size());
    std::string body = Text(0, 11, bars.y_label, "label");
    for (const double tick : ticks) {
      body += Line(left, y(tick), right, y(tick), "grid");
      body += Text(left - 6, y(tick) + 3.8, TickText(tick, ticks[1] - ticks[0]), "end tick");
    }
    double last_end = 0;
    for (size_t l = 0; l < bars.values.size(); ++l) {
      const double x = left + step * static_cast<double>(l);
      const double value = bars.values[l];
      if (std::isfinite(value)) {
        body += Box(x + step * 0.14, std::min(y(value), y(0)), step * 0.72,
                    std::max(0.8, std::abs(y(value) - y(0))),
                    std::string("rx=\"2\" class=\"") + (bars.marked[l] ? "kept" : "plain") + "\"",
                    "layer " + std::to_string(l) + ": " + TickText(value, std::abs(value) / 100) +
                        (bars.marked[l] ? ", keeps softmax attention" : ""));
      }
      const std::string text = std::to_string(l);
      const double centre = x + step / 2;
      if (centre - TextWidth(text) / 2 < last_end) continue;
      last_end = centre + TextWidth(text) / 2 + 4;
      body += Text(centre, bottom + 16, text, "mid tick");
    }
    body += Line(left, y(0), right, y(0), "axis");
    body += Text((left + right) / 2, bottom + 32, "layer", "mid label");
    return Svg(css, width, bottom + 38, "aria-label=\"" + EscapeHtml(bars.y_label) + "\"", body);
  };
  return "<div class=\"plot\">" + WideAndNarrow(bars.half, draw) + "</div>\n";
}

}  // namespace sala::recipes
