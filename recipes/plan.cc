#include "recipes/plan.h"

#include <algorithm>
#include <utility>

#include "model/parameters.h"
#include "model/units.h"
#include "parallel/ordered_sum.h"
#include "parallel/partition.h"
#include "recipes/gradient_reducer.h"
#include "recipes/halo/select.h"
#include "recipes/halo/settings.h"
#include "recipes/halo/transfer.h"
#include "recipes/plan_pass.h"
#include "recipes/step_batch.h"

namespace sala::recipes {
namespace {

using model::ParameterSpec;

bool Sliced(const PlanInput& input) { return input.mesh.zero_stage >= 2; }
int64_t ParamRanks(const PlanInput& input) { return input.mesh.dp * input.mesh.cp; }

int64_t MicroBatchCount(const PlanInput& input, int64_t samples) {
  const int64_t size = input.batch.micro_batch_sequences;
  return std::max<int64_t>(1, (samples + size - 1) / size);
}

// Samples of the global batch that a dp rank takes.
int64_t SamplesOf(const PlanInput& input, int64_t dp_rank) {
  const int64_t all = input.batch.global_batch_sequences();
  if (input.batch.rank_independent_sums) {
    const int64_t share =
        input.batch.micro_batches() / input.mesh.dp * input.batch.micro_batch_sequences;
    return std::clamp<int64_t>(all - dp_rank * share, 0, share);
  }
  return (all - dp_rank + input.mesh.dp - 1) / input.mesh.dp;
}

// The flat layout of what is trained, as one rank has it.
struct Layout {
  Layout(const PlanInput& input, const PassContext& at)
      : specs(input.phase == PlanPhase::kAlign
                  ? AllMixerSpecs(input.model, {at.tp, at.tp_ranks})
                  : model::ParameterSpecs(input.model, {at.tp, at.tp_ranks})),
        borders(model::UnitBorders(specs)),
        partition(GradientPartition(borders, static_cast<int>(ParamRanks(input)),
                                    input.batch.rank_independent_sums)) {}

  int64_t size() const { return borders.back(); }

  std::vector<ParameterSpec> specs;
  std::vector<int64_t> borders;
  parallel::UnitPartition partition;
};

// What the computation reads of a store whose float32 values lie in host memory, whole or not:
// model::ComputeParameters.
void AddParameters(const PlanInput& input, const std::vector<int64_t>& borders, int64_t shard,
                   bool host_whole, int64_t* parameters, MemoryPlan* memory) {
  const bool cuda = input.device == DeviceKind::kCuda;
  const bool sharded = input.mesh.zero_stage == 3;
  const int64_t host = (host_whole ? borders.back() : shard) * kFloat;
  const int64_t element = cuda ? 2 : kFloat;
  (cuda ? memory->host : *parameters) += host;
  if (sharded) memory->slots += model::SlotBorders(borders).back() * element;
  if (cuda) *parameters += (sharded ? shard : borders.back()) * element;
}

MemoryPlan Buffers(const PlanInput& input, const PassContext& at, const Layout& layout,
                   int64_t param_rank) {
  MemoryPlan memory;
  const auto rank = static_cast<int>(param_rank);
  const int64_t shard = layout.partition.shard_size(rank);
  const int64_t zero = input.mesh.zero_stage;
  const bool cuda = input.device == DeviceKind::kCuda;
  // HALO works on whole stores: transfer and assembly read all of them.
  const bool host_whole = input.phase != PlanPhase::kTrain || zero < 3;
  AddParameters(input, layout.borders, shard, host_whole, &memory.parameters, &memory);
  if (input.phase != PlanPhase::kTrain) {
    const model::ModelConfig& teacher =
        input.phase == PlanPhase::kAlign ? input.model : input.teacher;
    const std::vector<int64_t> borders =
        model::UnitBorders(model::ParameterSpecs(teacher, {at.tp, at.tp_ranks}));
    const parallel::UnitPartition partition(borders, layout.partition.ranks());
    AddParameters(input, borders, partition.shard_size(rank), true, &memory.frozen, &memory);
  }

  const bool alone = ParamRanks(input) == 1;
  memory.gradients =
      (Sliced(input) ? model::SlotBorders(layout.borders).back() : layout.size()) * kFloat;
  if (Sliced(input) || !alone) memory.gradients += shard * kFloat;
  if (input.batch.rank_independent_sums) {
    const int64_t share = (input.batch.micro_batches() + input.mesh.dp - 1) / input.mesh.dp;
    for (int64_t count = share; count > 1; count = parallel::SumTreeLeft(count))
      memory.gradients += layout.size() * kFloat;
  }
  const int64_t optimized = (zero >= 1 ? shard : layout.size()) * kFloat;
  memory.optimizer = (cuda ? 3 : 2) * optimized;
  if (cuda) memory.host += 2 * optimized;  // moments, while a checkpoint is written

  const int64_t units = layout.partition.units();
  if (Sliced(input) && !alone) {
    int64_t largest = 0;
    for (int64_t u = 0; u < units; ++u)
      largest = std::max(largest, layout.partition.counts(u)[static_cast<size_t>(rank)]);
    memory.exchange += largest * kFloat;
  }
  int64_t copies = 0;
  for (const std::vector<CopyRange>& unit : CopyRanges(layout.specs, units)) {
    for (const CopyRange& range : unit) {
      const auto ranks = static_cast<int>(range.copies);
      copies = std::max(
          copies, parallel::FlatPartition::Even(range.end - range.begin, ranks, 1).counts[0] + 1);
    }
  }
  memory.exchange += copies * kFloat;
  return memory;
}

// The hybrid is copied from the teacher and the mixers of all layers; these are gone when its
// softmax layers get their gates, which takes another copy.
int64_t Assembly(const PlanInput& input, const PassContext& at, const Layout& layout,
                 const MemoryPlan& memory) {
  if (input.phase != PlanPhase::kDistil && input.phase != PlanPhase::kFinetune) return 0;
  int64_t beside = layout.size();
  if (input.phase == PlanPhase::kDistil) {
    const std::vector<ParameterSpec> mixers = AllMixerSpecs(input.teacher, {at.tp, at.tp_ranks});
    beside = std::max(beside, model::UnitBorders(mixers).back());
  }
  return memory.frozen + (layout.size() + beside) * kFloat;
}

// Teacher, mixers, the arenas of the alignment, and two rows of each token of this rank's items:
// the residual stream at the input of a layer and the teacher's hidden states.
int64_t Scoring(const PlanInput& input, int64_t rank, const MemoryPlan& memory) {
  const ScoringInput& scoring = input.scoring;
  if (input.phase != PlanPhase::kDistil || scoring.text_tokens == 0) return 0;
  PlanInput align = input;
  align.phase = PlanPhase::kAlign;
  align.model = input.teacher;
  align.batch = scoring.align;
  PassContext at(align, rank);
  at.enter = at.enter_teacher = [](int64_t) {};
  PassMicroBatch(at, FullMicroBatches(align, rank).front());
  const int64_t piece = std::min(scoring.align.seq_len_tokens, scoring.text_tokens);
  for (const int64_t length : {piece, scoring.prompt_tokens})
    PassScore(at, input.teacher, {0, static_cast<int32_t>(length)});

  const int64_t dp = input.mesh.dp;
  const int64_t tokens =
      (scoring.text_tokens + dp - 1) / dp + (scoring.prompts + dp - 1) / dp * scoring.prompt_tokens;
  const int64_t part =
      model::ShareTokens(static_cast<int32_t>(tokens), at.cp, at.cp_ranks, at.tp, at.tp_ranks)
          .part();
  // Tokens, labels and positions of all items, and of this rank's once more.
  const int64_t items = scoring.text_tokens + scoring.prompts * scoring.prompt_tokens + tokens;
  const int64_t mixers =
      model::UnitBorders(AllMixerSpecs(input.teacher, {at.tp, at.tp_ranks})).back();
  return memory.frozen + mixers * kFloat + 2 * part * input.teacher.hidden_size * kFloat +
         3 * items * static_cast<int64_t>(sizeof(int32_t)) + at.arena.touched(input.huge_pages) +
         at.scratch.touched(input.huge_pages);
}

// Teacher and hybrid, and the arenas of the steps with a pass over a document of the fit.
int64_t Fitting(const PlanInput& input, const MemoryPlan& memory, PassContext& at) {
  if (input.fit_tokens == 0) return 0;
  model::ModelConfig handed_on = input.model;
  handed_on.attn_use_rope = false;
  handed_on.attn_use_output_gate = true;
  PassEvaluate(at, handed_on, {0, static_cast<int32_t>(input.fit_tokens)});
  const int64_t hybrid =
      model::UnitBorders(model::ParameterSpecs(handed_on, {at.tp, at.tp_ranks})).back();
  return memory.frozen + hybrid * kFloat + at.arena.touched(input.huge_pages) +
         at.scratch.touched(input.huge_pages);
}

// GradientReducer::Reduce of one unit.
void CountReduce(const PlanInput& input, const Layout& layout, int64_t param_rank,
                 const std::vector<CopyRange>& copies, int64_t unit, PassContext& at) {
  for (const CopyRange& range : copies) {
    const auto ranks = static_cast<int>(range.copies);
    const int64_t n = range.end - range.begin;
    const std::string group = range.copies < input.mesh.tp ? "kv" : "tp";
    const int64_t mine =
        parallel::FlatPartition::Even(n, ranks, 1).counts[static_cast<size_t>(at.tp % ranks)];
    at.Count(group + ".reduce_scatter", (n - mine) * kFloat);
    at.Count(group + ".all_gather", (n - mine) * kFloat);
  }
  if (ParamRanks(input) == 1) return;
  const int64_t others = layout.partition.unit_size(unit) -
                         layout.partition.counts(unit)[static_cast<size_t>(param_rank)];
  at.Count("param.reduce_scatter", others * kFloat);
  if (input.mesh.zero_stage == 0) at.Count("param.all_gather", others * kFloat);
}

int64_t SumCount(const PlanInput& input) {
  switch (input.phase) {
    case PlanPhase::kAlign:
      return 4 * input.model.num_hidden_layers;
    case PlanPhase::kDistil:
      return 4;
    default:
      return 2;
  }
}

// The few numbers of a step, and of its log.
void CountNumbers(const PlanInput& input, const Layout& layout, PassContext& at) {
  const int64_t others = input.ranks() - 1;
  constexpr int64_t kNumber = 8;
  if (others > 0) at.Count("world.gather_text", 0);  // AgreeOnStatus: no rank has an error
  at.Count("dp.all_reduce",
           kNumber * (2 + input.batch.global_batch_sequences()) * (input.mesh.dp - 1));
  at.Count("world.all_reduce", kNumber * others);  // requests of signals
  at.Count("world.all_reduce", kNumber * SumCount(input) * others);
  int64_t pieces = input.batch.rank_independent_sums ? 0 : 1;  // of the gradient norm
  for (int64_t u = 0; input.batch.rank_independent_sums && u < layout.partition.units(); ++u)
    pieces += static_cast<int64_t>(NormBorders(layout.partition, u).size()) - 1;
  at.Count("world.all_reduce", kNumber * pieces * others);
  constexpr int64_t kStragglerFloats = 6;
  if (input.log_every_step && others > 0)
    at.Count("world.all_gather", kStragglerFloats * kFloat * others);
}

// Units of one store that are fetched shortly before use.
class Fetches {
 public:
  Fetches(const std::vector<int64_t>& borders, int64_t ranks, int64_t rank, PassContext& at)
      : partition_(borders, static_cast<int>(ranks)), rank_(static_cast<size_t>(rank)), at_(at) {
    std::vector<int64_t> sizes;
    for (int64_t u = 0; u < partition_.units(); ++u) sizes.push_back(partition_.unit_size(u));
    schedule_ = model::SlotSchedule(std::move(sizes));
  }
  void Enter(int64_t unit) {
    schedule_.Enter(unit, [this](int64_t u) {
      at_.Count("param.all_gather",
                (partition_.unit_size(u) - partition_.counts(u)[rank_]) * at_.element);
    });
  }
  void Forget() { schedule_.Forget(); }

 private:
  parallel::UnitPartition partition_;
  size_t rank_;
  PassContext& at_;
  model::SlotSchedule schedule_;
};

// One step, from update to summed gradient.
void CountStep(const PlanInput& input, const Layout& layout, int64_t param_rank,
               const MicroBatches& micro_batches, PassContext& at) {
  const std::vector<std::vector<CopyRange>> copies =
      CopyRanges(layout.specs, layout.partition.units());
  const auto each_unit = [&](const auto& body) {
    for (int64_t u = 0; u < layout.partition.units(); ++u) {
      if (layout.partition.unit_size(u) > 0) body(u);
    }
  };
  const auto reduce = [&](int64_t u) {
    CountReduce(input, layout, param_rank, copies[static_cast<size_t>(u)], u, at);
  };
  const int64_t zero = input.mesh.zero_stage;
  if ((zero == 1 || zero == 2) && ParamRanks(input) > 1) {
    each_unit([&](int64_t u) {
      at.Count("param.all_gather", (layout.partition.unit_size(u) -
                                    layout.partition.counts(u)[static_cast<size_t>(param_rank)]) *
                                       at.element);
    });
  }
  for (const std::vector<int32_t>& documents : micro_batches) {
    PassMicroBatch(at, documents);
    if (Sliced(input)) each_unit(reduce);
  }
  if (!Sliced(input)) each_unit(reduce);
  CountNumbers(input, layout, at);
}

model::ModelConfig Hybrid(const model::ModelConfig& teacher, const HaloPlan& halo) {
  model::ModelConfig hybrid = AllLinear(teacher);
  const std::vector<int64_t> order =
      UniformOrder(teacher.num_hidden_layers, halo.forced, halo.softmax_layers);
  for (const int64_t layer : TakeLayers(order, halo.forced, halo.softmax_layers))
    hybrid.mixer_types[static_cast<size_t>(layer)] = NameOf(model::MixerType::kSoftmax);
  return hybrid;
}

}  // namespace

MicroBatches FullMicroBatches(const PlanInput& input, int64_t rank) {
  const int64_t dp = rank / input.mesh.tp / input.mesh.cp;
  const int64_t size = input.batch.micro_batch_sequences;
  int64_t left = SamplesOf(input, dp);
  // As many as the rank with most, where ranks exchange within a micro-batch.
  const int64_t count = MicroBatchCount(input, Sliced(input) ? SamplesOf(input, 0) : left);
  MicroBatches all;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int32_t>& cu_seqlens = all.emplace_back(1, 0);
    for (int64_t s = 0; s < std::min(left, size); ++s) {
      cu_seqlens.push_back(cu_seqlens.back() + static_cast<int32_t>(input.batch.seq_len_tokens));
    }
    left -= std::min(left, size);
  }
  return all;
}

RankPlan PlanRank(const PlanInput& input, int64_t rank, const MicroBatches& micro_batches) {
  PassContext at(input, rank);
  const Layout layout(input, at);
  const int64_t param_rank = rank / input.mesh.tp;
  at.enter = at.enter_teacher = [](int64_t) {};
  std::vector<Fetches> fetches;
  fetches.reserve(2);
  if (input.mesh.zero_stage == 3) {
    fetches.emplace_back(layout.borders, ParamRanks(input), param_rank, at);
    at.enter = [&fetches](int64_t unit) { fetches[0].Enter(unit); };
    if (input.phase == PlanPhase::kAlign || input.phase == PlanPhase::kDistil) {
      const model::ModelConfig& teacher =
          input.phase == PlanPhase::kAlign ? input.model : input.teacher;
      fetches.emplace_back(model::UnitBorders(model::ParameterSpecs(teacher, {at.tp, at.tp_ranks})),
                           ParamRanks(input), param_rank, at);
      at.enter_teacher = [&fetches](int64_t unit) { fetches[1].Enter(unit); };
    }
  }
  // The second step: what the teacher's slots hold at its begin is what the first one left.
  for (int step = 0; step < 2; ++step) {
    at.comm.clear();
    if (!fetches.empty()) fetches[0].Forget();
    CountStep(input, layout, param_rank, micro_batches, at);
  }
  RankPlan plan;
  plan.comm = at.comm;
  plan.memory = Buffers(input, at, layout, param_rank);
  plan.memory.activations = at.arena.peak();
  plan.memory.work_space = at.scratch.peak();
  if (input.device != DeviceKind::kCuda) {
    plan.memory.arena_ends = at.arena.touched(input.huge_pages) +
                             at.scratch.touched(input.huge_pages) - at.arena.peak() -
                             at.scratch.peak();
    plan.memory.assembly = Assembly(input, at, layout, plan.memory);
    plan.memory.scoring = Scoring(input, rank, plan.memory);
    plan.memory.fitting = Fitting(input, plan.memory, at);
  }
  return plan;
}

MemoryPlan PlanMemory(const PlanInput& input, int64_t rank) {
  MicroBatches micro_batches = FullMicroBatches(input, rank);
  micro_batches.resize(1);  // the others have no more tokens
  return PlanRank(input, rank, micro_batches).memory;
}

int64_t TrainedParameters(const PlanInput& input) {
  int64_t n = 0;
  const std::vector<ParameterSpec> specs = input.phase == PlanPhase::kAlign
                                               ? AllMixerSpecs(input.model)
                                               : model::ParameterSpecs(input.model);
  for (const ParameterSpec& spec : specs) n += spec.stored;
  return n;
}

WorkPlan WorkOf(const PlanInput& input) {
  const auto samples = static_cast<double>(input.batch.global_batch_sequences());
  const auto n = static_cast<double>(input.batch.seq_len_tokens);
  const auto work = [&](const model::ModelConfig& config) {
    return model::ForwardWorkOf(config, input.sparse_attention, input.batch.seq_len_tokens);
  };
  const auto times = [](const model::ForwardWork& forward, double all, double selection) {
    return model::ForwardWork{.products = all * forward.products,
                              .attention = all * forward.attention,
                              .selection = selection * forward.selection,
                              .lightning = all * forward.lightning};
  };
  WorkPlan plan;
  plan.forward = work(input.model);
  if (input.phase == PlanPhase::kAlign) {
    // The teacher forwards, and the mixers alone both ways, which have no gradient of their input.
    double weights = 0;
    for (const ParameterSpec& spec : AllMixerSpecs(input.model)) {
      if (spec.kind == model::ParameterKind::kMatrix) weights += static_cast<double>(spec.numel);
    }
    plan.step = times(plan.forward, samples, samples);
    plan.step.products += samples * 4 * weights * n;
    plan.step.lightning += samples * 3 * work(AllLinear(input.model)).lightning;
    return plan;
  }
  plan.step = times(plan.forward, 3 * samples, samples);
  if (input.phase == PlanPhase::kDistil) {
    const model::ForwardWork teacher = work(input.teacher);
    plan.step.products += samples * teacher.products;
    plan.step.attention += samples * teacher.attention;
    plan.step.selection += samples * teacher.selection;
    plan.step.lightning += samples * teacher.lightning;
  }
  return plan;
}

double StepFlop(const PlanInput& input) { return WorkOf(input).step.forward(); }

Status CheckPlan(const PlanInput& input) {
  SALA_RETURN_IF_ERROR(CheckShares(input.batch, input.mesh));
  if (const std::string problem = input.model.TensorParallelProblem(input.mesh.tp);
      !problem.empty())
    return MakeError(ExitCode::kConfig, "CFG-MESH", problem);
  if (input.device != DeviceKind::kCuda) return OkStatus();
  const std::string problem = input.model.Local({0, input.mesh.tp}).CudaProblem();
  if (problem.empty()) return OkStatus();
  return MakeError(ExitCode::kConfig, "CFG-MODEL", problem + "; use run.device: cpu");
}

StatusOr<std::vector<NamedPlan>> PlanStage(const StageConfig& stage, const RunConfig& run,
                                           int ranks, model::ModelConfig* model) {
  PlanInput common;
  SALA_ASSIGN_OR_RETURN(common.mesh, parallel::ResolveMesh(ranks, stage.parallel));
  common.device = run.device;
  common.threads = run.threads;
  common.log_every_step = run.log_every_steps == 1;
  common.recompute = stage.recompute;
  common.model = *model;
  std::vector<NamedPlan> plans;
  const auto add = [&](const std::string& phase, PlanInput input) -> Status {
    SALA_RETURN_IF_ERROR(CheckPlan(input));
    plans.push_back({phase, std::move(input)});
    return OkStatus();
  };
  if (stage.kind != StageKind::kHalo) {
    common.batch = stage.batch;
    common.sparse_attention = stage.sparse_attention;
    SALA_RETURN_IF_ERROR(add("train", common));
    return plans;
  }

  SALA_ASSIGN_OR_RETURN(const HaloPlan halo, PlanHalo(stage, *model));
  PlanInput align = common;
  align.phase = PlanPhase::kAlign;
  align.batch = stage.halo->align.batch;
  SALA_RETURN_IF_ERROR(add("align", align));
  PlanInput distil = common;
  distil.phase = PlanPhase::kDistil;
  distil.teacher = *model;
  distil.model = Hybrid(*model, halo);
  if (stage.halo->nope_at == HaloMoment::kDistil) distil.model.attn_use_rope = false;
  if (stage.halo->softmax_gate_at == HaloMoment::kDistil) distil.model.attn_use_output_gate = true;
  const bool fold = stage.halo->softmax_qk_norm == QkNormForm::kFold;
  if (fold && stage.halo->qk_norm_fold_at == HaloMoment::kDistil) distil.model.attn_qk_norm = false;
  distil.batch = stage.halo->distil.batch;
  distil.trainable = stage.halo->trainable;
  distil.cross_entropy = stage.halo->ce_weight > 0;
  const int64_t fit =
      stage.halo->logit_scale_grid.empty() ? 0 : stage.halo->logit_scale_length_tokens;
  if (!stage.halo->finetune) distil.fit_tokens = fit;
  if (NeedsLayerScores(stage.halo->selector) || stage.halo->selector == Selector::kGreedy) {
    const HaloScoreConfig& score = stage.halo->score;
    distil.scoring = {.align = stage.halo->align.batch,
                      .text_tokens = score.text_tokens,
                      .prompts = score.recall_items,
                      .prompt_tokens = score.recall_length_tokens};
  }
  SALA_RETURN_IF_ERROR(add("distil", distil));
  PlanInput finetune = distil;
  finetune.phase = PlanPhase::kFinetune;
  finetune.model.attn_use_rope = false;
  finetune.model.attn_use_output_gate = true;
  if (fold) finetune.model.attn_qk_norm = false;
  *model = finetune.model;
  if (!stage.halo->finetune) return plans;
  finetune.batch = stage.halo->finetune->batch;
  finetune.fit_tokens = fit;
  SALA_RETURN_IF_ERROR(add("finetune", finetune));
  return plans;
}

}  // namespace sala::recipes
