#include "recipes/halo/logit_scale.h"

#include <algorithm>

#include "model/loss.h"
#include "parallel/ordered_sum.h"

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
  std::vector<model::Batch> all;
  for (const model::Batch& batch : batches) {
    model::Batch& kept = all.emplace_back();
    kept.cu_seqlens = {0};
    for (const kernels::DocumentRange& range : kernels::Documents(batch.cu_seqlens)) {
      if (range.length() < least_tokens) continue;
      const auto append = [&range](const std::vector<int32_t>& from, std::vector<int32_t>* to) {
        to->insert(to->end(), from.begin() + range.begin, from.begin() + range.end);
      };
      append(batch.tokens, &kept.tokens);
      append(batch.labels, &kept.labels);
      append(batch.positions, &kept.positions);
      kept.cu_seqlens.push_back(static_cast<int32_t>(kept.size()));
    }
  }
  return all;
}

StatusOr<LogitScaleFit> FitLogitScale(const Context& ctx, Arena& arena, const model::Model& model,
                                      const std::vector<model::Batch>& batches,
                                      const std::vector<double>& grid, const parallel::Mesh& mesh) {
  LogitScaleFit fit;
  fit.candidates = {0.0};
  fit.candidates.insert(fit.candidates.end(), grid.begin(), grid.end());
  for (double base : fit.candidates) {
    std::vector<double> mine(2 * batches.size(), 0.0);
    for (size_t i = 0; i < batches.size(); ++i) {
      if (batches[i].size() == 0) continue;
      const auto result =
          model::EvaluateCrossEntropy(ctx, arena, model, batches[i], {.logit_scale_base = base});
      mine[2 * i] = result.loss_sum;
      mine[2 * i + 1] = static_cast<double>(result.targets);
    }
    SALA_ASSIGN_OR_RETURN(const std::vector<double> sums, parallel::SumDealtItems(mesh, mine, 2));
    fit.targets = static_cast<int64_t>(sums[1]);
    fit.losses.push_back(sums[0] / std::max(1.0, sums[1]));
  }
  const auto best = std::min_element(fit.losses.begin(), fit.losses.end());
  fit.base = fit.candidates[static_cast<size_t>(best - fit.losses.begin())];
  return fit;
}

}  // namespace sala::recipes
