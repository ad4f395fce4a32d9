// What a phase of training will exchange, hold in memory and compute, worked out from its
// configuration before anything is allocated (`sala plan`, docs/parallel.md). Pure functions.
//
// Exchanges are exact: the calls and bytes that parallel/comm_log.h counts from the summed gradient
// of one step to that of the next, given the documents of the micro-batches. What decides them in a
// run decides them here: ShareTokens, StateWindow, ParameterSpecs, GradientPartition, CopyRanges
// and SlotSchedule. Buffers are exact too; activations and work space follow the passes of the
// model (recipes/plan_pass.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/status.h"
#include "model/config.h"
#include "model/work.h"
#include "recipes/config.h"

namespace sala::recipes {

struct CommCount {
  int64_t calls = 0;
  int64_t bytes = 0;
  bool operator==(const CommCount&) const = default;
};
using CommPlan = std::map<std::string, CommCount>;  // by "GROUP.KIND", as in the metrics

// Bytes of one rank.
struct MemoryPlan {
  int64_t parameters = 0;   // what is trained: whole or this rank's shard
  int64_t frozen = 0;       // HALO's teacher
  int64_t slots = 0;        // ZeRO-3: units that take turns
  int64_t gradients = 0;    // with ZeRO-2 and 3 slots and shard
  int64_t optimizer = 0;    // moments; on a GPU the masters too
  int64_t exchange = 0;     // buffers of the thread beside the computation
  int64_t activations = 0;  // peak of the arena
  int64_t work_space = 0;   // peak of scratch; on a GPU that of loss and products only
  int64_t host = 0;         // cuda: the float32 store and the saved moments in host memory
  // CPU, beyond the two peaks: bytes at the ends of the arenas' blocks, in use at another moment,
  // and the rest of the last page of each.
  int64_t arena_ends = 0;
  // CPU, HALO, what is resident in moments beside the steps: buffers while the hybrid is put
  // together and all while layers are scored, before the first step of the distillation; all while
  // the logit scale is fitted, after the last step.
  int64_t assembly = 0, scoring = 0, fitting = 0;

  int64_t buffers() const { return parameters + frozen + slots + gradients + optimizer + exchange; }
  // Of the device computed on.
  int64_t total() const { return buffers() + activations + work_space; }
  // What becomes resident of all this at most.
  int64_t resident() const { return std::max({total() + arena_ends, assembly, scoring, fitting}); }
};

enum class PlanPhase : uint8_t {
  kTrain,     // next-token cross entropy
  kAlign,     // HALO: linear mixers of all layers beside the teacher's
  kDistil,    // HALO: the hybrid from the teacher
  kFinetune,  // HALO: the hybrid on next tokens, the teacher still in memory
};

// What HALO scores layers on, one item at a time (recipes/halo/score.h).
struct ScoringInput {
  BatchConfig align;        // whose arenas it goes on with, and the pieces of text of whose length
  int64_t text_tokens = 0;  // 0: no layer is scored
  int64_t prompts = 0, prompt_tokens = 0;
};

struct PlanInput {
  PlanPhase phase = PlanPhase::kTrain;
  model::ModelConfig model;    // trained, resolved; kAlign: the teacher
  model::ModelConfig teacher;  // kDistil and kFinetune
  BatchConfig batch;
  bool sparse_attention = false;
  bool recompute = true;
  HaloTrainable trainable = HaloTrainable::kAll;  // kDistil
  bool cross_entropy = false;                     // kDistil: ce_weight above 0
  parallel::MeshConfig mesh;                      // dp resolved
  DeviceKind device = DeviceKind::kCpu;
  int64_t threads = 1;
  // Whether every step is logged, which gathers a few numbers of every rank.
  bool log_every_step = true;
  ScoringInput scoring;    // kDistil
  int64_t fit_tokens = 0;  // HALO's last phase: of a document of the logit scale's fit; 0: no fit
  // Large pieces of memory become resident in pages of 2 MiB (core/host_memory.h).
  bool huge_pages = false;

  int64_t ranks() const { return mesh.dp * mesh.cp * mesh.tp; }
};

// cu_seqlens of each micro-batch of a rank, in order; {0} is an empty one.
using MicroBatches = std::vector<std::vector<int32_t>>;

// What the step loop makes of a step where every sample is one document of seq_len tokens.
MicroBatches FullMicroBatches(const PlanInput& input, int64_t rank);

struct RankPlan {
  MemoryPlan memory;
  CommPlan comm;
};
// `micro_batches` as FullMicroBatches has them for this rank.
RankPlan PlanRank(const PlanInput& input, int64_t rank, const MicroBatches& micro_batches);

// The memory of it where every sample is one document.
MemoryPlan PlanMemory(const PlanInput& input, int64_t rank);

// Parameters without gaps, padding and copies; of a step's useful work (model/work.h) over full
// samples, all ranks together.
int64_t TrainedParameters(const PlanInput& input);
double StepFlop(const PlanInput& input);
// The same by kind, as the forward pass of one sample of what is trained has them (HALO's
// alignment: of the teacher), and of a step.
struct WorkPlan {
  model::ForwardWork forward;  // one sample
  model::ForwardWork step;     // forward and backward, all samples
};
WorkPlan WorkOf(const PlanInput& input);

// What a run refuses before its first step, with its error: CFG-MESH, CFG-MODEL (78).
Status CheckPlan(const PlanInput& input);

// The phases of a stage: one of pretrain and sft, those of HALO for halo. `model` is what the stage
// starts from (HALO: the teacher) and becomes what it hands on. Which layers HALO keeps is not
// known; those of selector uniform stand for them, which changes no number but the place in the
// model. Checks as CheckPlan, and CFG-MESH where the mesh does not fit `ranks`.
struct NamedPlan {
  std::string phase;
  PlanInput input;
};
StatusOr<std::vector<NamedPlan>> PlanStage(const StageConfig& stage, const RunConfig& run,
                                           int ranks, model::ModelConfig* model);

}  // namespace sala::recipes
