// Numbers of plots: ticks, their texts, fewer points.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "core/elementary.h"
#include "core/utf8.h"
#include "recipes/report_svg.h"

namespace sala::recipes {
namespace {

std::string Printed(const char* format, int digits, double value) {
  std::array<char, 64> text{};
  const int n = std::snprintf(text.data(), text.size(), format, digits, value);
  return {text.data(), static_cast<size_t>(n)};
}

// The power of ten at or below a positive value.
int Exponent(double value) {
  auto exponent = static_cast<int>(std::floor(PortableLog(value) / PortableLog(10)));
  // The quotient of two rounded logarithms may miss a power of ten by one.
  if (PortablePow(10, exponent + 1) <= value) ++exponent;
  return exponent;
}

std::string WithCommas(const std::string& digits) {
  std::string text = digits;
  const size_t first = text[0] == '-' ? 1 : 0;
  for (size_t i = text.size(); i > first + 3; i -= 3) text.insert(i - 3, ",");
  return text;
}

}  // namespace

std::string EscapeHtml(const std::string& text) {
  std::string escaped;
  for (size_t at = 0; at < text.size();) {
    const size_t length = Utf8SequenceLength(text, at);
    const char c = text[at];
    if (length == 0 || (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t')) {
      escaped += "\xEF\xBF\xBD";
      ++at;
      continue;
    }
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (c == '>') {
      escaped += "&gt;";
    } else if (c == '"') {
      escaped += "&quot;";
    } else if (c == '\'') {
      escaped += "&#39;";
    } else {
      escaped += text.substr(at, length);
    }
    at += length;
  }
  return escaped;
}

std::vector<double> NiceTicks(double low, double high, int wanted) {
  if (!(high > low)) {
    const double room = low == 0 ? 1 : std::abs(low) * 0.1;
    low -= room;
    high += room;
  }
  // Closer together than this, numbers of float64 leave no room for ticks between them.
  const double least = 1e-9 * std::max(std::abs(low), std::abs(high));
  if (high - low < least) {
    low -= least;
    high += least;
  }
  const double raw = (high - low) / std::max(1, wanted);
  const double power = PortablePow(10, Exponent(raw));
  double spacing = 10 * power;
  for (const double factor : {1.0, 2.0, 5.0}) {
    // 1.5 times the wanted number is still readable, and fits the data more closely.
    if (factor * power * 1.5 >= raw) {
      spacing = factor * power;
      break;
    }
  }
  std::vector<double> ticks;
  const double first = std::floor(low / spacing);
  for (double i = first; ticks.empty() || ticks.back() < high - 1e-9 * spacing; ++i)
    ticks.push_back(i * spacing);
  return ticks;
}

std::vector<double> LogTicks(double low, double high) {
  const int first = Exponent(low);
  const int last = Exponent(high) + 1;
  std::vector<double> ticks;
  for (int e = first; e <= last; ++e) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (factor > 1 && last - first > 3) break;
      ticks.push_back(factor * PortablePow(10, e));
    }
  }
  // One below and one above stay.
  while (ticks.size() > 1 && ticks[1] <= low) ticks.erase(ticks.begin());
  while (ticks.size() > 1 && ticks[ticks.size() - 2] >= high) ticks.pop_back();
  return ticks;
}

std::string TickText(double value, double spacing) {
  if (!std::isfinite(value)) return "-";
  if (std::abs(value) < 1e-12 * std::max(1.0, std::abs(spacing)) || value == 0) return "0";
  const double size = std::abs(value);
  if (size < 1e-3 || size >= 1e12) return Printed("%.*e", spacing < 0.5 * size ? 1 : 0, value);
  if (size >= 1e6 && spacing >= 1e4) {
    const bool giga = size >= 1e9;
    const double scaled = value / (giga ? 1e9 : 1e6);
    return Printed("%.*f", std::abs(scaled - std::round(scaled)) < 1e-9 ? 0 : 1, scaled) +
           (giga ? "G" : "M");
  }
  const int digits = spacing >= 1 ? 0 : std::min(8, -Exponent(spacing * 1.0000001));
  const std::string text = Printed("%.*f", digits, value);
  return digits == 0 ? WithCommas(text) : text;
}

std::vector<PlotPoint> Downsample(const std::vector<PlotPoint>& points, int64_t buckets) {
  std::vector<PlotPoint> finite;
  std::copy_if(points.begin(), points.end(), std::back_inserter(finite),
               [](const PlotPoint& p) { return std::isfinite(p.x) && std::isfinite(p.y); });
  const auto n = static_cast<int64_t>(finite.size());
  if (n <= 4 * buckets) return finite;
  std::vector<PlotPoint> kept;
  for (int64_t b = 0; b < buckets; ++b) {
    const int64_t begin = b * n / buckets;
    const int64_t end = (b + 1) * n / buckets;
    const auto lower = [](const PlotPoint& p, const PlotPoint& q) { return p.y < q.y; };
    const auto range = std::minmax_element(finite.begin() + begin, finite.begin() + end, lower);
    std::vector<int64_t> indices = {begin, range.first - finite.begin(),
                                    range.second - finite.begin(), end - 1};
    std::sort(indices.begin(), indices.end());
    indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
    for (const int64_t i : indices) kept.push_back(finite[static_cast<size_t>(i)]);
  }
  return kept;
}

}  // namespace sala::recipes
