#include "recipes/halo/logit_scale.h"

#include <algorithm>

#include "model/loss.h"

namespace sala::recipes {

nlohmann::json LogitScaleFit::ToJson() const {
  nlohmann::json curve = nlohmann::json::array();
  for (size_t i = 0; i < candidates.size(); ++i) {
    const nlohmann::json a = candidates[i] > 0 ? nlohmann::json(candidates[i]) : nlohmann::json("none");
    curve.push_back({{"a", a}, {"loss", losses[i]}});
  }
  return {{"a", base > 0 ? nlohmann::json(base) : nlohmann::json("none")}, {"curve", curve}};
}

StatusOr<LogitScaleFit> FitLogitScale(const Context& ctx, Arena& arena, const model::Model& model,
                                      const std::vector<model::Batch>& batches, const std::vector<double>& grid,
                                      parallel::Communicator& comm) {
  LogitScaleFit fit;
  fit.candidates = {0.0};
  fit.candidates.insert(fit.candidates.end(), grid.begin(), grid.end());
  for (double base : fit.candidates) {
    double sums[2] = {0, 0};
    for (const model::Batch& batch : batches) {
      const auto result = model::EvaluateCrossEntropy(ctx, arena, model, batch, {.logit_scale_base = base});
      sums[0] += result.loss_sum;
      sums[1] += static_cast<double>(result.targets);
    }
    SALA_RETURN_IF_ERROR(comm.AllReduce(std::span<double>(sums), parallel::Reduce::kSum));
    fit.losses.push_back(sums[0] / std::max(1.0, sums[1]));
  }
  const auto best = std::min_element(fit.losses.begin(), fit.losses.end());
  fit.base = fit.candidates[static_cast<size_t>(best - fit.losses.begin())];
  return fit;
}

}  // namespace sala::recipes
