#include "recipes/layout_search.h"

#include <algorithm>
#include <cstdio>
#include <optional>
#include <utility>

namespace sala::recipes {
namespace {

constexpr int64_t kLeastRange = 256;  // tokens of a cp rank; below it exchanges are all there is

// Of a rank's step with this many micro-batches, of which all but the first exchange alike.
CommPlan CommOf(const RankPlan& one, const RankPlan& two, int64_t micro_batches) {
  CommPlan comm = one.comm;
  for (const auto& [name, count] : two.comm) {
    CommCount& to = comm[name];
    const CommCount first = to;
    to.calls += (micro_batches - 1) * (count.calls - first.calls);
    to.bytes += (micro_batches - 1) * (count.bytes - first.bytes);
  }
  return comm;
}

PhaseEstimate Estimate(const std::string& phase, const PlanInput& input, const Gpu& gpu) {
  PhaseEstimate made;
  made.phase = phase;
  made.input = input;
  for (const int64_t rank : {int64_t{0}, input.ranks() - 1}) {
    // A rank like the busiest one, whatever its number.
    MicroBatches all = FullMicroBatches(input, 0);
    const auto micro_batches = static_cast<int64_t>(all.size());
    all.resize(std::min<size_t>(all.size(), 2), all[0]);
    const RankPlan two = PlanRank(input, rank, all);
    all.resize(1);
    const RankPlan one = PlanRank(input, rank, all);
    const CommPlan comm = CommOf(one, two, micro_batches);
    int64_t bytes = 0;
    for (const auto& [name, count] : comm) bytes += count.bytes;
    made.exchanged_bytes = std::max(made.exchanged_bytes, bytes);
    if (one.memory.total() > made.memory.total()) made.memory = one.memory;
    const StepTime time = EstimateStep(input, gpu, comm, one.memory);
    if (time.total() > made.time.total()) made.time = time;
  }
  const auto gpus = static_cast<double>(input.ranks());
  made.tokens_per_second =
      static_cast<double>(input.batch.global_batch_tokens) / made.time.total() / gpus;
  made.of_peak = StepFlop(input) / made.time.total() / gpus / gpu.bf16_flops;
  return made;
}

bool FitsIn(const MemoryPlan& memory, const Gpu& gpu) {
  return static_cast<double>(memory.total()) <= kUsableMemory * gpu.memory_bytes;
}

// The quickest micro-batch that fits; without one the smallest, which does not.
StatusOr<PhaseEstimate> BestMicroBatch(const NamedPlan& plan, bool recompute, const Gpu& gpu) {
  PlanInput input = plan.input;
  input.recompute = recompute;
  const int64_t most = (input.batch.global_batch_sequences() + input.mesh.dp - 1) / input.mesh.dp;
  constexpr int64_t kMostTokens = (int64_t{1} << 31) - 1;
  std::optional<PhaseEstimate> best;
  Status refused = OkStatus();
  for (int64_t micro = 1; micro <= most && micro * input.batch.seq_len_tokens <= kMostTokens;
       micro *= 2) {
    input.batch.micro_batch_sequences = micro;
    if (const Status status = CheckPlan(input); !status.ok()) {
      refused = status;
      continue;
    }
    PhaseEstimate made = Estimate(plan.phase, input, gpu);
    const bool fits = FitsIn(made.memory, gpu);
    if (!best || (fits && made.time.total() < best->time.total())) best = std::move(made);
    if (!fits) break;  // larger ones take more
  }
  if (!best) return refused;
  return *std::move(best);
}

double Seconds(const std::vector<PhaseEstimate>& phases) {
  double seconds = 0;
  for (const PhaseEstimate& phase : phases)
    seconds += phase.time.total() * static_cast<double>(phase.input.batch.steps);
  return seconds;
}

// HALO's layers always run again.
std::vector<bool> RecomputeChoices(const StageConfig& stage) {
  return stage.kind == StageKind::kHalo ? std::vector<bool>{true} : std::vector<bool>{false, true};
}

// The better first: what fits, then the quicker, then the one that leaves more memory.
bool Better(const LayoutEstimate& a, const LayoutEstimate& b, const Gpu& gpu) {
  const bool fits = a.Fits(gpu);
  if (fits != b.Fits(gpu)) return fits;
  if (!fits) return a.most_bytes() < b.most_bytes();
  return a.seconds != b.seconds ? a.seconds < b.seconds : a.most_bytes() < b.most_bytes();
}

StatusOr<LayoutEstimate> BestOfMesh(const StageConfig& stage, const std::vector<NamedPlan>& plans,
                                    const Gpu& gpu) {
  std::optional<LayoutEstimate> best;
  for (const bool recompute : RecomputeChoices(stage)) {
    LayoutEstimate made;
    made.mesh = plans[0].input.mesh;
    made.recompute = recompute;
    for (const NamedPlan& plan : plans) {
      SALA_ASSIGN_OR_RETURN(PhaseEstimate phase, BestMicroBatch(plan, recompute, gpu));
      made.phases.push_back(std::move(phase));
    }
    made.seconds = Seconds(made.phases);
    if (!best || Better(made, *best, gpu)) best = std::move(made);
  }
  return *std::move(best);
}

std::vector<parallel::MeshConfig> Meshes(const StageConfig& stage, int gpus, const Gpu& gpu,
                                         int64_t longest) {
  std::vector<parallel::MeshConfig> meshes;
  for (int64_t tp = 1; tp <= std::min(gpus, gpu.per_host); ++tp) {
    for (int64_t cp = 1; cp <= gpus / tp; ++cp) {
      if (gpus % (cp * tp) != 0 || (cp > 1 && longest / cp < kLeastRange)) continue;
      for (const int64_t zero : {1, 2, 3}) {
        parallel::MeshConfig mesh = stage.parallel;
        mesh.dp = gpus / (cp * tp);
        mesh.cp = cp;
        mesh.tp = tp;
        mesh.zero_stage = zero;
        meshes.push_back(mesh);
      }
    }
  }
  return meshes;
}

int64_t LongestSample(const StageConfig& stage) {
  if (!stage.halo) return stage.batch.seq_len_tokens;
  return std::max({stage.halo->align.batch.seq_len_tokens, stage.halo->distil.batch.seq_len_tokens,
                   stage.halo->finetune ? stage.halo->finetune->batch.seq_len_tokens : 0});
}

Status NothingFits(const LayoutEstimate& least, int gpus, const Gpu& gpu) {
  char text[400];
  std::snprintf(
      text, sizeof(text),
      "no layout of %d x %s fits: the smallest, dp %lld x cp %lld x tp %lld with ZeRO %lld, needs "
      "%.1f GB of the %.1f GB in use of %.0f; take more GPUs, larger ones, or shorter samples",
      gpus, gpu.name, static_cast<long long>(least.mesh.dp), static_cast<long long>(least.mesh.cp),
      static_cast<long long>(least.mesh.tp), static_cast<long long>(least.mesh.zero_stage),
      static_cast<double>(least.most_bytes()) / 1e9, kUsableMemory * gpu.memory_bytes / 1e9,
      gpu.memory_bytes / 1e9);
  return MakeError(ExitCode::kConfig, "PLAN-FIT", text);
}

}  // namespace

int64_t LayoutEstimate::most_bytes() const {
  int64_t most = 0;
  for (const PhaseEstimate& phase : phases) most = std::max(most, phase.memory.total());
  return most;
}

bool LayoutEstimate::Fits(const Gpu& gpu) const {
  return std::all_of(phases.begin(), phases.end(),
                     [&gpu](const PhaseEstimate& phase) { return FitsIn(phase.memory, gpu); });
}

StatusOr<LayoutSearch> SearchLayouts(const StageConfig& stage, const RunConfig& run, int gpus,
                                     const Gpu& gpu, size_t shown, model::ModelConfig* model) {
  RunConfig on_gpu = run;
  on_gpu.device = DeviceKind::kCuda;
  LayoutSearch search;
  const model::ModelConfig start = *model;
  // The file's own.
  model::ModelConfig after = start;
  if (auto plans = PlanStage(stage, on_gpu, gpus, &after); plans.ok()) {
    LayoutEstimate written;
    written.mesh = (*plans)[0].input.mesh;
    written.recompute = stage.recompute;
    for (const NamedPlan& plan : *plans)
      written.phases.push_back(Estimate(plan.phase, plan.input, gpu));
    written.seconds = Seconds(written.phases);
    search.written.push_back(std::move(written));
  } else {
    search.refused = MessageOf(plans.status());
  }

  std::vector<LayoutEstimate> all;
  Status refused = OkStatus();
  for (const parallel::MeshConfig& mesh : Meshes(stage, gpus, gpu, LongestSample(stage))) {
    StageConfig changed = stage;
    changed.parallel = mesh;
    model::ModelConfig result = start;
    const auto plans = PlanStage(changed, on_gpu, gpus, &result);
    auto best = plans.ok() ? BestOfMesh(changed, *plans, gpu) : plans.status();
    if (!best.ok()) {
      refused = best.status();
      continue;
    }
    *model = result;
    all.push_back(*std::move(best));
  }
  if (all.empty()) return refused;
  search.meshes = static_cast<int64_t>(all.size());
  std::stable_sort(all.begin(), all.end(),
                   [&gpu](const auto& a, const auto& b) { return Better(a, b, gpu); });
  search.fitting = std::count_if(all.begin(), all.end(),
                                 [&gpu](const LayoutEstimate& a) { return a.Fits(gpu); });
  if (search.fitting == 0) return NothingFits(all[0], gpus, gpu);
  all.resize(std::min({all.size(), shown, static_cast<size_t>(search.fitting)}));
  search.best = std::move(all);
  return search;
}

}  // namespace sala::recipes
