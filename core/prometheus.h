// Metrics in Prometheus' text format, for a textfile collector.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace sala {

enum class PrometheusType { kGauge, kCounter };

struct PrometheusSample {
  std::vector<std::pair<std::string, std::string>> labels;
  double value = 0;
};

// All samples of one name; a counter's name ends in _total.
struct PrometheusFamily {
  std::string name;
  std::string help;
  PrometheusType type = PrometheusType::kGauge;
  std::vector<PrometheusSample> samples;
};

// HELP, TYPE and samples of each family; those without samples are left out. Label values and help
// may be any text.
std::string PrometheusText(const std::vector<PrometheusFamily>& families);

}  // namespace sala
