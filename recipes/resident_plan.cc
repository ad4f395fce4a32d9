#include "recipes/resident_plan.h"

#include <algorithm>

#include "core/check.h"
#include "core/file.h"
#include "data/token_store.h"

namespace sala::recipes {
namespace {

constexpr int64_t kKilo = 1000;

// Measured on x86-64 with GCC 12, glibc 2.36, Open MPI 4.1 and HDF5 1.10, as the difference between
// the peak of runs of some tiny models and what a dry run has and plans. Nearly all of it are pages
// of code, which differ little between builds.
constexpr int64_t kTraining = 9200 * kKilo;
// Of mpi with its shared memory, in a rank of one to eight on a host.
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

}  // namespace

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
  const auto held_out =
      static_cast<int64_t>(std::min(static_cast<double>(stage.data.validation.max_tokens),
                                    stage.data.validation.fraction * counts.tokens));
  plan.data = kDocumentBytes * counts.documents +
              kSlotBytes * (batch.seq_len_tokens * (sequences + batch.micro_batch_sequences) +
                            held_out / input.mesh.dp);
  plan.memory = memory.resident();
  return plan;
}

StatusOr<ResidentPlan> PlanResident(const ProcessStart& start, const StageConfig& stage,
                                    const RunConfig& run, int ranks, int rank,
                                    const std::string& phase, model::ModelConfig model) {
  SALA_ASSIGN_OR_RETURN(const std::vector<NamedPlan> plans, PlanStage(stage, run, ranks, &model));
  const auto plan = std::find_if(plans.begin(), plans.end(), [&phase](const NamedPlan& candidate) {
    return candidate.phase == phase;
  });
  SALA_CHECK(plan != plans.end()) << "phase " << phase;
  return PlanResident(start, stage, plan->input, PlanMemory(plan->input, rank));
}

}  // namespace sala::recipes
