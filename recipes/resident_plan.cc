#include "recipes/resident_plan.h"

#include <algorithm>

#include "core/file.h"
#include "core/host_memory.h"
#include "core/memory.h"
#include "data/token_store.h"

namespace sala::recipes {
namespace {

constexpr int64_t kKilo = 1000;

// Fitted residuals, not counts: the peak of runs less what a dry run has and plans, on x86-64 with
// GCC 12, glibc 2.36, Open MPI 4.1 and HDF5 1.10. Nearly all of it should be pages of code, which
// differ little between builds, but an error of the other terms would hide here.
// Fitted to the models tiny, long and weights of tests/integration/memory_test.py.
constexpr int64_t kTraining = 9200 * kKilo;
// Of mpi with its shared memory, fitted to one and two ranks on a host.
constexpr int64_t kTransport = 9300 * kKilo;
// Of a document in a stage's lists: offset, source and hash, mapped once for training and once for
// held-out data; number and length; and its place in the order of its file (data/view.h).
constexpr int64_t kDocumentBytes = 2 * 18 + 16 + 48;
// Tokens, labels and positions of a packed slot.
constexpr int64_t kSlotBytes = 12;

struct DataCounts {
  int64_t documents = 0;
  double tokens = 0;
};

DataCounts CountData(const StageConfig& stage) {
  DataCounts counts;
  for (const data::ViewConfig& view : stage.data.mixture) {
    if (!PathExists(view.dataset + "/dataset.json")) continue;
    const auto info = data::ReadDatasetInfo(view.dataset);
    if (!info.ok()) continue;  // what is wrong with it the run says
    counts.documents += info->documents;
    counts.tokens += static_cast<double>(info->tokens);
  }
  return counts;
}

// Held-out tokens that the datasets should have; chance decides which documents are held out.
int64_t HeldOutTokens(const StageConfig& stage, const DataCounts& counts) {
  return static_cast<int64_t>(stage.data.validation.fraction * counts.tokens);
}

}  // namespace

ProcessStart MeasureStart(bool mpi) {
  return {.bytes = ResidentBytes(), .mpi = mpi, .huge_pages = SystemGivesHugePages()};
}

void AddMachine(const ProcessStart& start, const StageConfig& stage, PlanInput* input) {
  input->huge_pages = start.huge_pages;
  if (input->scoring.text_tokens == 0) return;
  const DataCounts counts = CountData(stage);
  if (counts.documents == 0) return;
  input->scoring.text_tokens =
      std::clamp<int64_t>(HeldOutTokens(stage, counts), 1, input->scoring.text_tokens);
}

ResidentPlan PlanResident(const ProcessStart& start, const StageConfig& stage,
                          const PlanInput& input, const MemoryPlan& memory) {
  ResidentPlan plan;
  if (input.device == DeviceKind::kCuda) return plan;
  plan.program = start.bytes;
  plan.training = kTraining;
  if (input.ranks() > 1 && !start.mpi) plan.transport = kTransport;
  // The samples of a step and their micro-batch once more.
  const BatchConfig& batch = input.batch;
  const int64_t sequences = (batch.global_batch_sequences() + input.mesh.dp - 1) / input.mesh.dp;
  const DataCounts counts = CountData(stage);
  const int64_t held_out = std::min(stage.data.validation.max_tokens, HeldOutTokens(stage, counts));
  plan.data = kDocumentBytes * counts.documents +
              kSlotBytes * (batch.seq_len_tokens * (sequences + batch.micro_batch_sequences) +
                            held_out / input.mesh.dp);
  plan.memory = memory.resident();
  return plan;
}

StatusOr<ResidentPlan> PlanResident(const ProcessStart& start, const StageConfig& stage,
                                    const RunConfig& run, int ranks, int rank,
                                    const std::string& phase, model::ModelConfig model) {
  if (run.device == DeviceKind::kCuda) return ResidentPlan();
  SALA_ASSIGN_OR_RETURN(std::vector<NamedPlan> plans, PlanStage(stage, run, ranks, &model));
  const auto plan = std::find_if(plans.begin(), plans.end(), [&phase](const NamedPlan& candidate) {
    return candidate.phase == phase;
  });
  if (plan == plans.end()) {
    return MakeError(ExitCode::kInternal, "INTERNAL",
                     "stage " + stage.name + ": the plan has no phase '" + phase + "'");
  }
  AddMachine(start, stage, &plan->input);
  return PlanResident(start, stage, plan->input, PlanMemory(plan->input, rank));
}

}  // namespace sala::recipes
