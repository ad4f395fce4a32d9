// How long a step might take on a machine that is not here: a model from published peak rates and
// the shares of them that the kernels reached on one H100 (docs/benchmarks), to compare layouts
// with each other. Other GPUs are taken to give the same shares; exchanges are assumed, not
// measured; what it leaves out (the gaps between kernels, data, checkpoints, slow ranks) makes real
// steps longer.
//
// A step is the busiest rank's micro-batches, one after the other:
//   products      FLOP / (0.71 peak), or the time to read weights and update gradients if longer
//   attention     dense 0.31 peak forward, 0.19 backward (2.5 times the operations); with block
//                 selection 0.23 and 0.17, the mean of neighbours that share their blocks and
//                 tokens that choose each for itself, at 32K; the selection 0.27. The last of cp
//                 ranges has most pairs: dense attention and selection take (2 - 1 / cp) times the
//                 mean
//   Lightning     60 KB a token and layer forward, 163 KB backward, for heads of 4096 features
//   element-wise  220 KB forward, 354 KB backward a token and layer, for 4096 features
//   exchanges     bytes / (0.78 of the slowest link of the group) + 10 us a call; inside layers
//                 awaited; of gradients and parameters what the computation beside them cannot
//                 hide, and a tenth of the rest, which takes memory and processors from it
//   update        30 bytes of memory traffic a parameter of the rank
// Memory is read at 0.9 of its peak. With recompute each layer runs forward twice.
#pragma once

#include "recipes/gpu.h"
#include "recipes/plan.h"

namespace sala::recipes {

// Seconds.
struct StepTime {
  double products = 0, attention = 0, selection = 0, lightning = 0, elementwise = 0;
  double exchange = 0;  // awaited
  double update = 0;
  double compute() const { return products + attention + selection + lightning + elementwise; }
  double total() const { return compute() + exchange + update; }
};

// `comm` and `memory` as PlanRank has them for a step of this input.
StepTime EstimateStep(const PlanInput& input, const Gpu& gpu, const CommPlan& comm,
                      const MemoryPlan& memory);

// Bytes a second that a rank of a mesh's group ("tp", "cp", "kv", "param", others: all ranks) can
// count on, one direction.
double GroupRate(const std::string& group, const parallel::MeshConfig& mesh, const Gpu& gpu);

}  // namespace sala::recipes
