// HyPE's logit scale s_t = log(t + a) / log(a) for position-free softmax layers, fitted after
// conversion with frozen weights (docs/math/halo.md 7; arXiv 2601.22156 section 5).
#pragma once

#include <vector>

#include "core/context.h"
#include "model/model.h"
#include "nlohmann/json.hpp"
#include "parallel/mesh.h"

namespace sala::recipes {

struct LogitScaleFit {
  double base = 0;                 // a; 0: no scale is best
  std::vector<double> candidates;  // 0 (none) first, then the grid
  std::vector<double> losses;      // nats per target, one per candidate
  int64_t targets = 0;             // 0: nothing to fit on, base is 0

  nlohmann::json ToJson() const;
};

// Each batch without its documents of fewer than `least_tokens` tokens: the scale is 1 at the start
// of a document, so short ones say little about it. A batch may end up empty.
std::vector<model::Batch> LongDocuments(const std::vector<model::Batch>& batches,
                                        int64_t least_tokens);

// Mean loss over all targets of `batches` for no scale and for each a of the grid; the lowest wins,
// ties to the earlier. Collective over the mesh, to whose dp ranks the batches are dealt: batch i
// lies on rank i mod DP. The weights are only read.
StatusOr<LogitScaleFit> FitLogitScale(const Context& ctx, Arena& arena, const model::Model& model,
                                      const std::vector<model::Batch>& batches,
                                      const std::vector<double>& grid, const parallel::Mesh& mesh);

}  // namespace sala::recipes
