// Plots as SVG text. Every plot is drawn twice, for a wide and for a narrow page; the page's style
// sheet shows one. Colours are classes and variables of that style sheet. Texts are escaped here.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sala::recipes {

// & < > " ' as entities, bytes that are not UTF-8 or control characters as a replacement character.
std::string EscapeHtml(const std::string& text);

// Round numbers that cover [low, high] of an axis: 1, 2 or 5 times a power of ten apart, about
// `wanted` of them; the first is not above low and the last not below high.
std::vector<double> NiceTicks(double low, double high, int wanted);
// Powers of ten, with 2 and 5 where few of them fit; low above 0.
std::vector<double> LogTicks(double low, double high);
// As short as ticks `spacing` apart allow: "0.25", "1,500", "2e-05", "1.2M".
std::string TickText(double value, double spacing);

struct PlotPoint {
  double x = 0, y = 0;
};

// At most about `buckets` * 4 points: of each bucket along x the first, lowest, highest and last,
// so that spikes stay. Points come by rising x; those that are not finite are left out.
std::vector<PlotPoint> Downsample(const std::vector<PlotPoint>& points, int64_t buckets);

struct PlotSeries {
  enum class Style : uint8_t {
    kLine,
    kFaint,  // behind its smooth form; no entry in the legend
    kDots,   // held-out values; one entry for all
    kDashed
  };
  std::string name = {};
  int colour = 0;  // of the palette; -1: neutral
  Style style = Style::kLine;
  std::vector<PlotPoint> points = {};
};

struct PlotBand {  // a stage
  double from = 0, to = 0;
  std::string name = {};
  int colour = 0;
};

struct Plot {
  std::string x_label = {}, y_label = {};
  bool log_x = false, log_y = false;
  bool zero = false;  // the y axis begins at 0
  bool half = false;  // two of them stand beside each other on a wide page
  std::vector<PlotBand> bands = {};
  std::vector<PlotSeries> series = {};
};

// "" without any finite point. Hovering shows values (the page's script reads data-plot).
std::string LinePlot(const Plot& plot);

// Cells of a grid with values between 0 and 1; NaN is an empty cell.
struct HeatMap {
  bool half = false;
  std::string x_label = {}, y_label = {};
  std::vector<std::string> columns = {}, rows = {};
  std::vector<std::vector<double>> values = {};      // [row][column]
  std::vector<std::vector<std::string>> notes = {};  // tooltips, likewise
};
std::string HeatMapPlot(const HeatMap& map);

// One bar per name, below each other, made of pieces next to each other.
struct StackedBars {
  std::string unit = {};
  std::vector<std::string> pieces = {};  // coloured in order
  std::vector<std::pair<std::string, std::vector<double>>> bars = {};
};
std::string StackedBarPlot(const StackedBars& bars);

// Upright bars, one per layer, marked ones in the accent colour.
struct LayerBars {
  std::string y_label = {};
  bool share = false;  // the axis runs from 0 to 1
  bool half = false;
  std::vector<double> values = {};
  std::vector<bool> marked = {};
};
std::string LayerBarPlot(const LayerBars& bars);

}  // namespace sala::recipes
