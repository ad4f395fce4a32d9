#include "core/prometheus.h"

#include <array>
#include <cmath>
#include <cstdio>

namespace sala {
namespace {

// Quotes are escaped in label values only.
std::string Escaped(const std::string& text, bool quoted) {
  std::string escaped;
  for (const char c : text) {
    if (c == '\\' || (quoted && c == '"')) {
      escaped += '\\';
      escaped += c;
    } else if (c == '\n') {
      escaped += "\\n";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

std::string NumberText(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  std::array<char, 32> text{};
  const int n = std::snprintf(text.data(), text.size(), "%.17g", value);
  return {text.data(), static_cast<size_t>(n)};
}

}  // namespace

std::string PrometheusText(const std::vector<PrometheusFamily>& families) {
  std::string text;
  for (const PrometheusFamily& family : families) {
    if (family.samples.empty()) continue;
    text += "# HELP " + family.name + " " + Escaped(family.help, false) + "\n";
    text += "# TYPE " + family.name +
            (family.type == PrometheusType::kCounter ? " counter\n" : " gauge\n");
    for (const PrometheusSample& sample : family.samples) {
      std::string labels;
      for (const auto& [name, value] : sample.labels)
        labels += (labels.empty() ? "" : ",") + name + "=\"" + Escaped(value, true) + "\"";
      text += family.name + (labels.empty() ? "" : "{" + labels + "}") + " " +
              NumberText(sample.value) + "\n";
    }
  }
  return text;
}

}  // namespace sala
