// How long a step might take on a machine that is not here: a model from published peak rates and
// assumed efficiencies, to compare layouts with each other. Not measured; what it leaves out (the
// gaps between kernels, data, checkpoints, slow ranks) makes real steps longer.
//
// A step is the busiest rank's micro-batches, one after the other:
//   products      FLOP / (0.71 peak), or the time to read weights and update gradients if longer
//   attention     dense 0.61 peak forward, 0.51 backward (2.5 times the operations); with block
//                 selection 0.28 and 0.22; the selection 0.30. The last of cp ranges has most
//                 pairs: dense attention and selection take (2 - 1 / cp) times the mean
//   Lightning     49 KB a token and layer forward, 112 KB backward, for heads of 4096 features
//   element-wise  216 KB forward, 430 KB backward a token and layer, for 4096 features
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
