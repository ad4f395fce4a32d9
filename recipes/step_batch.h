// The samples of a step: which of the global batch a rank takes, and what becomes of them.
#pragma once

#include <cstdint>
#include <vector>

#include "data/stream.h"
#include "model/model.h"
#include "recipes/config.h"
#include "recipes/session.h"

namespace sala::recipes {

// Of the whole global batch, equal on all ranks: what a sum is divided by.
struct StepCounts {
  int64_t targets = 0;  // labels >= 0
  int64_t tokens = 0;   // without padding
};

// One global batch as this rank sees it.
struct StepData {
  std::vector<data::PackedSample> mine;
  StepCounts counts;  // of all ranks
  uint32_t crc = 0;   // of all samples, in order
  Request request = Request::kNone;
};

// Collective. The global batch of the step that follows `done` ones, and what any rank was asked
// for by a signal: the highest request counts.
StatusOr<StepData> LoadStep(Session& session, const BatchConfig& config, data::SampleStream& stream,
                            int64_t done);

// CFG-MESH (78) when the micro-batches of a step cannot be shared out over this mesh (dp resolved)
// as `rank_independent_sums` asks.
Status CheckShares(const BatchConfig& batch, const parallel::MeshConfig& mesh);

// Samples as one packed micro-batch, padding dropped; of none an empty one.
model::Batch MakeBatch(const std::vector<data::PackedSample>& samples);

// This rank's samples of a held-out set, a batch each: sample i is dealt to dp rank i mod DP. All
// ranks have equally many, the last one may be empty: ranks exchange while they evaluate.
StatusOr<std::vector<model::Batch>> HeldOutBatches(const data::ValidationSet& set,
                                                   const parallel::Mesh& mesh);

}  // namespace sala::recipes
