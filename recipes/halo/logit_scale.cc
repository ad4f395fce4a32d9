#include "recipes/halo/logit_scale.h"

#include <algorithm>

#include "model/loss.h"

namespace sala::recipes {

nlohmann::json LogitScaleFit::ToJson() const {
  nlohmann::json curve = nlohmann::json::array();
  for (size_t i = 0; i < candidates.size(); ++i) {
    const nlohmann::json a =
        candidates[i] > 0 ? nlohmann::json(candidates[i]) : nlohmann::json("none");
    curve.push_back({{"a", a}, {"loss", losses[i]}});
  }
  return {{"a", base > 0 ? nlohmann::json(base) : nlohmann::json("none")}, {"curve", curve}};
}

std::vector<model::Batch> LongDocuments(const std::vector<model::Batch>& batches,
                                        int64_t least_tokens) {
  std::vector<model::Batch> documents;
  for (const model::Batch& batch : batches) {
    for (const kernels::DocumentRange& range : kernels::Documents(batch.cu_seqlens)) {
      if (range.length() < least_tokens) continue;
      const auto part = [&range](const std::vector<int32_t>& v) {
        return std::vector<int32_t>(v.begin() + range.begin, v.begin() + range.end);
      };
      documents.push_back({.tokens = part(batch.tokens),
                           .labels = part(batch.labels),
                           .positions = part(batch.positions),
                           .cu_seqlens = {0, static_cast<int32_t>(range.length())}});
    }
  }
  return documents;
}

StatusOr<LogitScaleFit> FitLogitScale(const Context& ctx, Arena& arena, const model::Model& model,
                                      const std::vector<model::Batch>& batches,
                                      const std::vector<double>& grid,
                                      parallel::Communicator& comm) {
  LogitScaleFit fit;
  fit.candidates = {0.0};
  fit.candidates.insert(fit.candidates.end(), grid.begin(), grid.end());
  for (double base : fit.candidates) {
    double sums[2] = {0, 0};
    for (const model::Batch& batch : batches) {
      const auto result =
          model::EvaluateCrossEntropy(ctx, arena, model, batch, {.logit_scale_base = base});
      sums[0] += result.loss_sum;
      sums[1] += static_cast<double>(result.targets);
    }
    SALA_RETURN_IF_ERROR(comm.AllReduce(std::span<double>(sums), parallel::Reduce::kSum));
    fit.targets = static_cast<int64_t>(sums[1]);
    fit.losses.push_back(sums[0] / std::max(1.0, sums[1]));
  }
  const auto best = std::min_element(fit.losses.begin(), fit.losses.end());
  fit.base = fit.candidates[static_cast<size_t>(best - fit.losses.begin())];
  return fit;
}

}  // namespace sala::recipes
