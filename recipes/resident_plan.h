// The most physical memory that the process of a rank will have (VmHWM of Linux) in a run on the
// CPU: said by `sala plan` and `sala train --dry-run`, and held against the measured one by the run
// itself (metrics/ranks.jsonl).
//
// A phase's MemoryPlan is what the program asks for on purpose. The rest belongs to libraries: what
// they take before a run begins is measured in the process that asks; what only a run takes of them
// is a residual, fitted once to a few runs (resident_plan.cc). Not in it: evaluations (`eval`),
// reading a model from a folder, and with a resumed run the pieces in which a checkpoint is read.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "model/config.h"
#include "recipes/config.h"
#include "recipes/plan.h"

namespace sala::recipes {

// This process before the first stage, with its tokenizer loaded.
struct ProcessStart {
  int64_t bytes = 0;        // resident
  bool mpi = false;         // MPI is started, and so among the bytes
  bool huge_pages = false;  // the system gives them to who asks
};
ProcessStart MeasureStart(bool mpi);

// What PlanStage leaves open in the input of a phase of `stage`: huge pages, and how much held-out
// text layers can be scored on where the datasets are there already.
void AddMachine(const ProcessStart& start, const StageConfig& stage, PlanInput* input);

// Bytes of one rank.
struct ResidentPlan {
  int64_t program = 0;    // code, libraries and tokenizer: ProcessStart
  int64_t training = 0;   // fitted: code and tables of libraries that only a run uses
  int64_t transport = 0;  // fitted: MPI, where the process that asks has not started it
  int64_t data = 0;       // lists of documents; samples of a step; held-out samples
  int64_t memory = 0;     // MemoryPlan::resident()

  int64_t total() const { return program + training + transport + data + memory; }
};

// Of a phase of `stage`; `memory` is that of a rank, of an input that AddMachine has seen.
// Documents are counted where the datasets are there already. All zeros with run.device: cuda,
// whose driver takes what it likes of the host.
ResidentPlan PlanResident(const ProcessStart& start, const StageConfig& stage,
                          const PlanInput& input, const MemoryPlan& memory);

// The same of one rank and phase of a stage that starts from `model` (HALO: from the teacher), and
// the errors of PlanStage. INTERNAL (70) where the stage has no such phase.
StatusOr<ResidentPlan> PlanResident(const ProcessStart& start, const StageConfig& stage,
                                    const RunConfig& run, int ranks, int rank,
                                    const std::string& phase, model::ModelConfig model);

}  // namespace sala::recipes
