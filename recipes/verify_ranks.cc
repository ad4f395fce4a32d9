// The check of `sala verify` of one rank against several (recipes/verify.h).
#include <algorithm>
#include <cmath>

#include "recipes/verify_compare.h"
#include "recipes/verify_pass.h"
#include "recipes/verify_run.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

// Calls change(batch, schedule, optimizer) for every training phase.
template <typename Change>
void ForEachPhase(PipelineConfig& config, const Change& change) {
  for (StageConfig& stage : config.stages) {
    if (!stage.halo) {
      change(stage.batch, stage.schedule, stage.optimizer);
      continue;
    }
    for (HaloPhaseConfig* phase : {&stage.halo->align, &stage.halo->distil})
      change(phase->batch, phase->schedule, phase->optimizer);
    if (stage.halo->finetune) {
      HaloPhaseConfig& phase = *stage.halo->finetune;
      change(phase.batch, phase.schedule, phase.optimizer);
    }
  }
}

// Sums that do not know the number of ranks, shared out evenly over two.
PipelineConfig ExactConfig(const VerifyContext& context) {
  PipelineConfig config = context.scaled->config;
  ForEachPhase(config, [](BatchConfig& batch, ScheduleConfig&, OptimizerConfig&) {
    batch.rank_independent_sums = true;
    if (batch.micro_batches() % 2 != 0)
      batch.global_batch_tokens = 2 * batch.micro_batch_sequences * batch.seq_len_tokens;
  });
  for (StageConfig& stage : config.stages)
    stage.parallel.zero_stage = std::min<int64_t>(stage.parallel.zero_stage, 1);
  return config;
}

// One step a phase, at rates of zero: every layout computes the gradient at the same point, and
// after the first update the first moments hold it. Layers are chosen evenly, since scores that
// differ in the last bits may choose others.
PipelineConfig OneStepConfig(const VerifyContext& context) {
  PipelineConfig config = context.scaled->config;
  ForEachPhase(config,
               [](BatchConfig& batch, ScheduleConfig& schedule, OptimizerConfig& optimizer) {
                 batch.rank_independent_sums = false;
                 batch.steps = 1;
                 schedule = {.shape = ScheduleShape::kConstant, .peak_lr = 0};
                 optimizer.clip_norm = 0;
               });
  for (StageConfig& stage : config.stages) {
    if (stage.halo && stage.halo->selector != Selector::kExplicit)
      stage.halo->selector = Selector::kUniform;
  }
  SaveEveryStep(config);
  return config;
}

// Layouts add the same numbers in another order. A gradient is a sum over the 128 to 900 tokens of
// a step, whose partial sums are rounded with 2^-24 = 6e-8 each: as a random walk sqrt(900) * 6e-8
// = 1.8e-6 of what was added up, compared as ||a - b|| / ||a|| over a tensor. Of norms of queries
// and keys, where terms cancel, the sum is a third of that or so.
constexpr double kLayoutBound = 5e-6;

struct LargestDifference {
  double value = 0;
  std::string where;
};

double Relative(double a, double b) { return a == b ? 0 : std::abs(a - b) / std::abs(a); }

// The first step of every phase of two runs of OneStepConfig.
Status CompareFirstSteps(const std::string& where, const std::string& one, const std::string& many,
                         LargestDifference* largest, VerifyRow* row) {
  const auto take = [&](const std::string& what, double difference) {
    if (!(difference <= largest->value)) *largest = {difference, what};
    if (!(difference <= kLayoutBound)) {
      row->Fail(where + ": " + what + " differs by " + ShortText(difference) +
                " of its size, at most " + ShortText(kLayoutBound));
    }
  };
  SALA_ASSIGN_OR_RETURN(const auto a, Metrics(one));
  SALA_ASSIGN_OR_RETURN(const auto b, Metrics(many));
  for (const auto& [key, line] : a) {
    const auto it = b.find(key);
    if (it == b.end() || it->second.value("data_crc", json()) != line.value("data_crc", json())) {
      row->Fail(where + ": " + StepText(key) + " has other samples, or is missing");
      continue;
    }
    for (const char* field : {"loss", "grad_norm"}) {
      take(std::string(field) + " of " + StepText(key),
           Relative(line.value(field, std::nan("")), it->second.value(field, std::nan(""))));
    }
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<SavedStep> steps_a, SavedSteps(one));
  SALA_ASSIGN_OR_RETURN(const std::vector<SavedStep> steps_b, SavedSteps(many));
  if (steps_a.size() != steps_b.size()) {
    row->Fail(where + ": " + std::to_string(steps_b.size()) + " checkpoints, expected " +
              std::to_string(steps_a.size()));
    return OkStatus();
  }
  for (size_t i = 0; i < steps_a.size(); ++i) {
    const StagePosition& at = steps_a[i].position;
    SALA_ASSIGN_OR_RETURN(const std::vector<TensorDifference> tensors,
                          Differences(steps_a[i].directory, steps_b[i].directory));
    for (const TensorDifference& tensor : tensors) {
      const std::string what = "stage " + at.stage + ", " + at.phase + ": " + Named(tensor);
      if (!tensor.note.empty()) {
        row->Fail(where + ": " + what + ": " + tensor.note);
      } else if (tensor.kind == TensorKind::kExpAvg) {
        take(what, tensor.equal ? 0 : tensor.relative);
      } else if (tensor.kind == TensorKind::kParam && !tensor.equal) {
        // At rates of zero parameters keep their bits.
        row->Fail(where + ": " + what + " changed at a rate of zero");
      }
    }
  }
  return OkStatus();
}

// Each stage on the user's own cp and tp; 1 where no stage cuts samples.
int LayoutRanks(const VerifyContext& context) {
  int64_t ranks = 1;
  for (const parallel::MeshConfig& mesh : context.scaled->meshes)
    ranks = std::max(ranks, mesh.cp * mesh.tp);
  return static_cast<int>(ranks);
}

PipelineConfig OnMeshes(const VerifyContext& context, PipelineConfig config) {
  for (size_t i = 0; i < config.stages.size(); ++i)
    config.stages[i].parallel = context.scaled->meshes[i];
  return config;
}

}  // namespace

StatusOr<VerifyRow> VerifyRanks(const VerifyContext& context) {
  VerifyRow row;
  row.compared = "one rank with several";
  if (context.ranks == 1) {
    row.verdict = Verdict::kNotChecked;
    row.notes.emplace_back("--ranks 1 was given");
    return row;
  }
  if (!context.no_mpirun.empty()) {
    row.Fail(context.no_mpirun + "; install it, or leave this check out with --ranks 1");
    return row;
  }
  const auto run = [&](const std::string& name, const PipelineConfig& config,
                       int ranks) -> StatusOr<std::string> {
    SALA_ASSIGN_OR_RETURN(const std::string file, WritePipeline(context, name, config));
    const std::string directory = RunDirectory(context, name);
    SALA_RETURN_IF_ERROR(Train(context, name, {.config = file, .run = directory, .ranks = ranks}));
    return directory;
  };
  BitCount count;
  const PipelineConfig exact = ExactConfig(context);
  SALA_ASSIGN_OR_RETURN(const std::string exact_one, run("exact-one-rank", exact, 1));
  SALA_ASSIGN_OR_RETURN(const std::string exact_two, run("exact-ranks", exact, context.ranks));
  SALA_RETURN_IF_ERROR(CompareRuns(std::to_string(context.ranks) + " ranks, rank_independent_sums",
                                   context, exact_one, exact_two, &count, &row));
  if (context.interrupted()) return row;

  LargestDifference largest;
  const PipelineConfig step = OneStepConfig(context);
  SALA_ASSIGN_OR_RETURN(const std::string one, run("step-one-rank", step, 1));
  SALA_ASSIGN_OR_RETURN(const std::string data, run("step-data-ranks", step, context.ranks));
  SALA_RETURN_IF_ERROR(
      CompareFirstSteps("dp " + std::to_string(context.ranks), one, data, &largest, &row));
  row.compared += ": dp " + std::to_string(context.ranks);
  const int ranks = LayoutRanks(context);
  if (ranks > 1) {
    SALA_ASSIGN_OR_RETURN(const std::string cut,
                          run("step-layout", OnMeshes(context, step), ranks));
    const std::string layout = "cp x tp on " + std::to_string(ranks) + " ranks";
    SALA_RETURN_IF_ERROR(CompareFirstSteps(layout, one, cut, &largest, &row));
    row.compared += ", the configuration's " + layout;
  }
  row.measured = "with rank_independent_sums " + BitsText(count) +
                 "; without, gradients differ by " + ShortText(largest.value) + " of their size";
  row.bound = "equal bits; " + ShortText(kLayoutBound);
  return row;
}

}  // namespace sala::recipes
