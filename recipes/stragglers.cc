#include "recipes/stragglers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "nlohmann/json.hpp"

namespace sala::recipes {
namespace {

constexpr size_t kWindow = 50;

// What each rank sends, in milliseconds.
enum Value : size_t { kP50, kP95, kMax, kComm, kMeanCompute, kMeanComm, kValues };

// The smallest value that at least `share` of `sorted` do not exceed.
double Quantile(const std::vector<double>& sorted, double share) {
  const auto n = static_cast<double>(sorted.size());
  const auto rank = static_cast<size_t>(std::ceil(share * n));
  return sorted[std::max<size_t>(rank, 1) - 1];
}

}  // namespace

void Stragglers::Add(double step_seconds, double comm_seconds) {
  compute_.push_back(step_seconds - comm_seconds);
  if (compute_.size() > kWindow) compute_.pop_front();
  comm_ += comm_seconds;
  all_compute_ += step_seconds - comm_seconds;
  all_comm_ += comm_seconds;
  ++steps_;
}

StatusOr<nlohmann::ordered_json> Stragglers::Gather(parallel::Communicator& world, int64_t step) {
  std::array<float, kValues> mine{};
  if (steps_ > 0) {
    std::vector<double> sorted(compute_.begin(), compute_.end());
    std::sort(sorted.begin(), sorted.end());
    const auto set = [&mine](Value value, double seconds) {
      mine[value] = static_cast<float>(seconds * 1e3);
    };
    set(kP50, Quantile(sorted, 0.5));
    set(kP95, Quantile(sorted, 0.95));
    set(kMax, sorted.back());
    set(kComm, comm_);
    set(kMeanCompute, all_compute_ / static_cast<double>(steps_));
    set(kMeanComm, all_comm_ / static_cast<double>(steps_));
  }
  comm_ = 0;
  const auto ranks = static_cast<size_t>(world.size());
  gathered_.assign(ranks * kValues, 0);
  const std::vector<int64_t> counts(ranks, kValues);
  SALA_RETURN_IF_ERROR(world.AllGather(mine, counts, gathered_));
  const auto column = [&](Value value) {
    auto values = nlohmann::ordered_json::array();
    // Microseconds are exact enough, and short to read.
    for (size_t rank = 0; rank < ranks; ++rank)
      values.push_back(std::round(gathered_[rank * kValues + value] * 1e3) / 1e3);
    return values;
  };
  return nlohmann::ordered_json{{"step", step},
                                {"p50_ms", column(kP50)},
                                {"p95_ms", column(kP95)},
                                {"max_ms", column(kMax)},
                                {"comm_ms", column(kComm)}};
}

std::vector<std::string> Stragglers::Table(const std::vector<std::string>& hosts,
                                           size_t rows) const {
  if (gathered_.empty()) return {};
  const size_t ranks = gathered_.size() / kValues;
  std::vector<size_t> order(ranks);
  std::iota(order.begin(), order.end(), size_t{0});
  const auto mean = [this](size_t rank) { return gathered_[rank * kValues + kMeanCompute]; };
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return mean(a) > mean(b); });
  const double median = mean(order[ranks / 2]);
  std::vector<std::string> lines;
  std::array<char, 160> text{};
  std::snprintf(text.data(), text.size(), "%-24s %12s %10s %10s %10s %14s %10s", "slowest ranks",
                "compute ms", "p50", "p95", "max", "collectives ms", "of median");
  lines.emplace_back(text.data());
  for (size_t i = 0; i < std::min(rows, ranks); ++i) {
    const float* values = gathered_.data() + order[i] * kValues;
    const std::string name =
        std::to_string(order[i]) + (order[i] < hosts.size() ? "@" + hosts[order[i]] : "");
    std::snprintf(text.data(), text.size(), "%-24s %12.2f %10.2f %10.2f %10.2f %14.2f %9.2fx",
                  name.c_str(), static_cast<double>(values[kMeanCompute]),
                  static_cast<double>(values[kP50]), static_cast<double>(values[kP95]),
                  static_cast<double>(values[kMax]), static_cast<double>(values[kMeanComm]),
                  median > 0 ? static_cast<double>(values[kMeanCompute]) / median : 0);
    lines.emplace_back(text.data());
  }
  return lines;
}

}  // namespace sala::recipes
