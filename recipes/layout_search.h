// Which layouts of a stage fit a number of GPUs of a kind, and which of them a model of their speed
// prefers (`sala plan --gpus`, docs/parallel.md).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "recipes/gpu.h"
#include "recipes/plan.h"
#include "recipes/step_time.h"

namespace sala::recipes {

// Of the advertised memory; the rest is for kernels' work space, libraries and their buffers.
constexpr double kUsableMemory = 0.95;

struct PhaseEstimate {
  PlanInput input;
  std::string phase;
  MemoryPlan memory;            // the larger of the first and the last rank
  int64_t exchanged_bytes = 0;  // in a step, the same
  StepTime time;
  double tokens_per_second = 0;  // a GPU
  double of_peak = 0;            // useful work (StepFlop) as a share of the GPU's peak
};

struct LayoutEstimate {
  parallel::MeshConfig mesh;
  bool recompute = true;
  std::vector<PhaseEstimate> phases;
  double seconds = 0;  // all steps of all phases
  int64_t most_bytes() const;
  bool Fits(const Gpu& gpu) const;
};

struct LayoutSearch {
  std::vector<LayoutEstimate> best;  // the quickest first, one a mesh; all fit
  int64_t meshes = 0;                // that the run accepts
  int64_t fitting = 0;
  // As the stage's file has it, or why that cannot be on this many ranks.
  std::vector<LayoutEstimate> written;
  std::string refused;
};

// `model` as in PlanStage; `shown` bounds `best`. Micro-batches are powers of two. PLAN-FIT (78)
// where nothing fits; what PlanStage refuses for every mesh.
StatusOr<LayoutSearch> SearchLayouts(const StageConfig& stage, const RunConfig& run, int gpus,
                                     const Gpu& gpu, size_t shown, model::ModelConfig* model);

}  // namespace sala::recipes
