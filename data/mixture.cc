#include "data/mixture.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/check.h"

namespace sala::data {

StatusOr<Mixture> Mixture::Make(const std::vector<double>& weights) {
  double sum = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] > 0) || !std::isfinite(weights[i])) {
      return MakeError(ExitCode::kConfig, "MIX-WEIGHT",
                       "mixture entry " + std::to_string(i) + ": found weight " +
                           std::to_string(weights[i]) +
                           ", expected a positive number; remove the entry to leave it out");
    }
    sum += weights[i];
  }
  if (weights.empty())
    return MakeError(ExitCode::kConfig, "MIX-WEIGHT",
                     "the mixture has no entries; name at least one dataset");
  Mixture mixture;
  for (const double weight : weights) {
    mixture.weights_.push_back(std::max<int64_t>(1, std::llround(weight / sum * 4294967296.0)));
    mixture.total_ += mixture.weights_.back();
  }
  mixture.counts_.assign(weights.size(), 0);
  return mixture;
}

int64_t Mixture::Select() const {
  size_t best = 0;
  __extension__ using Wide = __int128;
  Wide best_score = 0;
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Wide score =
        static_cast<Wide>(weights_[i]) * (g_ + 1) - static_cast<Wide>(total_) * counts_[i];
    if (i == 0 || score > best_score) {
      best = i;
      best_score = score;
    }
  }
  return static_cast<int64_t>(best);
}

const std::vector<int64_t>& Mixture::CountsBefore(int64_t g) {
  SALA_CHECK(g >= 0) << "sample " << g;
  if (g < g_) {
    g_ = 0;
    counts_.assign(counts_.size(), 0);
  }
  for (; g_ < g; ++g_) ++counts_[static_cast<size_t>(Select())];
  return counts_;
}

Mixture::Choice Mixture::At(int64_t g) {
  CountsBefore(g);
  const int64_t view = Select();
  return {view, counts_[static_cast<size_t>(view)]};
}

}  // namespace sala::data
