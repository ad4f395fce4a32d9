// The checks of `sala verify` that compare whole runs of the program: resume, saves, ranks,
// checkpoints.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <system_error>
#include <utility>

#include "core/checkpoint.h"
#include "core/file.h"
#include "recipes/verify_pass.h"
#include "recipes/verify_run.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

constexpr int64_t kMiddle = kVerifySteps / 2;  // the step after which a phase is stopped

// "model.layers.3.mlp.up_proj.weight (layer 3, exp_avg)"
std::string Named(const TensorDifference& tensor) {
  const std::string layer = LayerOfTensor(tensor.name);
  return tensor.name + " (" + (layer.empty() ? "" : layer + ", ") +
         std::string(NameOf(tensor.kind)) + ")";
}

// ---- configurations ----

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

// ---- comparisons ----

// Of a line of metrics, what the bits of a run decide.
constexpr const char* kStepFields[] = {"loss_hex", "grad_norm_hex", "data_crc", "lr"};

// Steps (begin, end] of a run.
struct StepRange {
  int64_t begin = 0;
  int64_t end = std::numeric_limits<int64_t>::max();
};

// Where steps are not the same bits in both runs; "" when they are. The first one only: all later
// ones follow from it. `run_b` has the steps of the range, `run_a` those and others.
StatusOr<std::string> FirstOtherStep(const std::string& run_a, const std::string& run_b,
                                     const StepRange& range = {}) {
  SALA_ASSIGN_OR_RETURN(const auto a, Metrics(run_a));
  SALA_ASSIGN_OR_RETURN(const auto b, Metrics(run_b));
  for (const auto& [key, line] : a) {
    const int64_t step = std::get<0>(key);
    if (step > range.begin && step <= range.end && b.find(key) == b.end())
      return StepText(key) + " is in one of the runs only";
  }
  for (const auto& [key, line] : b) {
    const auto it = a.find(key);
    if (it == a.end()) return StepText(key) + " is in one of the runs only";
    for (const char* field : kStepFields) {
      if (it->second.value(field, json()) != line.value(field, json())) {
        return StepText(key) + ": " + field + " is " + it->second.value(field, json()).dump() +
               " and " + line.value(field, json()).dump();
      }
    }
  }
  return std::string();
}

StatusOr<std::vector<TensorDifference>> Differences(const std::string& a, const std::string& b) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint first, Checkpoint::Open(a));
  SALA_ASSIGN_OR_RETURN(const Checkpoint second, Checkpoint::Open(b));
  return DiffCheckpoints(first, second);
}

// What was compared bit for bit.
struct BitCount {
  int64_t tensors = 0, other = 0;
};

// Final checkpoints of a stage, bit for bit; the first tensors that differ become failures.
Status CompareFinals(const std::string& where, const std::string& run_a, const std::string& run_b,
                     const std::string& stage, BitCount* count, std::vector<std::string>* found) {
  SALA_ASSIGN_OR_RETURN(const SavedStep a, FinalOf(run_a, stage));
  SALA_ASSIGN_OR_RETURN(const SavedStep b, FinalOf(run_b, stage));
  SALA_ASSIGN_OR_RETURN(const std::vector<TensorDifference> tensors,
                        Differences(a.directory, b.directory));
  constexpr int64_t kShown = 3;
  int64_t other = 0;
  for (const TensorDifference& tensor : tensors) {
    ++count->tensors;
    if (tensor.equal) continue;
    if (++other > kShown) continue;
    found->push_back(
        where + ": final checkpoint of stage " + stage + ": " + Named(tensor) + ": " +
        (tensor.note.empty() ? "largest difference " + ShortText(tensor.max_abs) : tensor.note));
  }
  count->other += other;
  if (other > kShown) {
    found->push_back(where + ": final checkpoint of stage " + stage + ": and " +
                     std::to_string(other - kShown) + " more tensors");
  }
  return OkStatus();
}

// Two runs of one pipeline: every step and every stage's final checkpoint.
Status CompareRuns(const std::string& where, const VerifyContext& context, const std::string& run_a,
                   const std::string& run_b, BitCount* count, VerifyRow* row) {
  SALA_ASSIGN_OR_RETURN(const std::string step, FirstOtherStep(run_a, run_b));
  if (!step.empty()) row->Fail(where + ": " + step);
  std::vector<std::string> found;
  for (const StageConfig& stage : context.scaled->config.stages)
    SALA_RETURN_IF_ERROR(CompareFinals(where, run_a, run_b, stage.name, count, &found));
  for (const std::string& line : found) row->Fail(line);
  return OkStatus();
}

std::string BitsText(const BitCount& count) {
  return std::to_string(count.tensors - count.other) + " of " + std::to_string(count.tensors) +
         " tensors have the same bits";
}

// ---- copies of run directories ----

Status CopyTree(const std::string& from, const std::string& to) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(to).parent_path(), error);
  std::filesystem::copy(from, to, std::filesystem::copy_options::recursive, error);
  if (!error) return OkStatus();
  return MakeError(ExitCode::kIo, "FILE-WRITE",
                   to + ": copying from " + from + " failed: " + error.message());
}

std::string BaseName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// A run directory as it was when `step` of `run` was saved: that checkpoint and the result of the
// stage before.
Status RewindTo(const std::string& run, const SavedStep& step, const std::string& copy) {
  SALA_RETURN_IF_ERROR(CopyTree(step.directory, copy + "/checkpoints/" + BaseName(step.directory)));
  SALA_ASSIGN_OR_RETURN(const std::vector<SavedStep> steps, SavedSteps(run));
  for (const SavedStep& before : steps) {
    if (before.position.stage_final &&
        before.position.stage_index == step.position.stage_index - 1) {
      return CopyTree(before.directory, copy + "/checkpoints/" + BaseName(before.directory));
    }
  }
  return OkStatus();
}

struct Flip {
  std::string tensor;
  int64_t element = 0;
};

// Writes the checkpoint again, with right checksums, and with the highest mantissa bit of the
// largest element of one first moment turned over.
StatusOr<Flip> RewriteWithOneBit(const std::string& directory) {
  Flip flip;
  CheckpointInfo info;
  std::string config;
  std::string model;
  std::vector<std::vector<char>> content;
  std::vector<TensorSlice> slices;
  {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
    info = checkpoint.info();
    SALA_ASSIGN_OR_RETURN(config, checkpoint.ReadConfig());
    SALA_ASSIGN_OR_RETURN(model, checkpoint.ReadExtra("model.yaml"));
    content.reserve(checkpoint.tensors().size());
    for (const StoredTensor& tensor : checkpoint.tensors()) {
      const int64_t elements = tensor.numel();
      std::vector<char>& bytes =
          content.emplace_back(static_cast<size_t>(elements) * SizeOf(tensor.dtype));
      SALA_RETURN_IF_ERROR(checkpoint.ReadRaw(tensor, 0, elements, bytes.data()));
      slices.push_back({.name = tensor.name,
                        .kind = tensor.kind,
                        .dtype = tensor.dtype,
                        .shape = tensor.shape,
                        .data = bytes.data()});
      if (tensor.kind != TensorKind::kExpAvg || tensor.dtype != DType::kF32 || !flip.tensor.empty())
        continue;
      std::vector<float> values(static_cast<size_t>(elements));
      std::memcpy(values.data(), bytes.data(), bytes.size());
      const auto largest = std::max_element(
          values.begin(), values.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
      if (largest == values.end() || *largest == 0) continue;
      constexpr uint32_t kHighestMantissaBit = uint32_t{1} << 22;
      *largest = std::bit_cast<float>(std::bit_cast<uint32_t>(*largest) ^ kHighestMantissaBit);
      std::memcpy(bytes.data(), values.data(), bytes.size());
      flip = {tensor.name, largest - values.begin()};
    }
  }
  if (flip.tensor.empty()) {
    return MakeError(ExitCode::kData, "CKPT-TENSOR",
                     directory + ": no first moment that is not zero");
  }
  const std::string root = directory.substr(0, directory.rfind('/'));
  SALA_RETURN_IF_ERROR(RemoveTree(directory));
  SALA_ASSIGN_OR_RETURN(CheckpointCommit commit,
                        CheckpointCommit::Begin(root, info.global_step, 0));
  SALA_ASSIGN_OR_RETURN(const WrittenSlices written,
                        WriteCheckpointSlices(commit.directory(), 0, commit.save_id(), slices));
  SALA_RETURN_IF_ERROR(commit.Finish(info, {written}, config, {{"model.yaml", model}}).status());
  // The control is honest only where nothing but the value gives it away.
  SALA_ASSIGN_OR_RETURN(const Checkpoint again, Checkpoint::Open(directory));
  SALA_RETURN_IF_ERROR(again.Verify(VerifyLevel::kDeep));
  return flip;
}

// ---- resume ----

// The pipeline up to and with the stage of this index.
PipelineConfig UpTo(const VerifyContext& context, int64_t stage_index) {
  PipelineConfig config = context.scaled->config;
  config.stages.resize(static_cast<size_t>(stage_index) + 1);
  return config;
}

// Goes on from `step` of the straight run in a directory of its own, to the end of its stage;
// `flip`: after one bit was changed. Returns what differs from the straight run.
StatusOr<std::vector<std::string>> ResumeAt(const VerifyContext& context, const std::string& run,
                                            const SavedStep& step, Flip* flip, BitCount* count) {
  const StagePosition& at = step.position;
  const std::string where = "stage " + at.stage + ", " + at.phase + ", resumed after step " +
                            std::to_string(at.phase_step);
  const std::string name =
      std::string(flip == nullptr ? "resumed-" : "one-bit-") + at.stage + "-" + at.phase;
  const std::string copy = RunDirectory(context, name);
  SALA_RETURN_IF_ERROR(RewindTo(run, step, copy));
  if (flip != nullptr) {
    SALA_ASSIGN_OR_RETURN(*flip,
                          RewriteWithOneBit(copy + "/checkpoints/" + BaseName(step.directory)));
  }
  SALA_ASSIGN_OR_RETURN(const std::string file,
                        WritePipeline(context, name, UpTo(context, at.stage_index)));
  SALA_RETURN_IF_ERROR(Train(context, name, {.config = file, .run = copy}));
  std::vector<std::string> found;
  SALA_ASSIGN_OR_RETURN(const SavedStep end, FinalOf(run, at.stage));
  SALA_ASSIGN_OR_RETURN(
      const std::string other,
      FirstOtherStep(run, copy, {.begin = step.global_step, .end = end.global_step}));
  if (!other.empty()) found.push_back(where + ": " + other);
  SALA_RETURN_IF_ERROR(CompareFinals(where, run, copy, at.stage, count, &found));
  return found;
}

// Stopped by a signal, started again, and the whole compared.
Status StopAndGoOn(const VerifyContext& context, BitCount* count, VerifyRow* row) {
  SALA_ASSIGN_OR_RETURN(const std::string straight, StraightRun(context, false));
  const std::string run = RunDirectory(context, "stopped");
  SALA_ASSIGN_OR_RETURN(const std::string file,
                        WritePipeline(context, "stopped", context.scaled->config));
  SALA_RETURN_IF_ERROR(Train(context, "stopped", {.config = file, .run = run, .stop = true},
                             static_cast<int>(ExitCode::kRequeue)));
  SALA_RETURN_IF_ERROR(Train(context, "stopped, started again", {.config = file, .run = run}));
  return CompareRuns("stopped by SIGUSR2 and started again", context, straight, run, count, row);
}

// ---- ranks ----

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

// ---- checkpoints ----

// One bit of a stored tensor turned over in its file. Returns the tensor.
StatusOr<std::string> DamageOneBit(const std::string& directory, const std::string& file) {
  std::string wanted;
  std::vector<char> bytes;
  {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
    for (const StoredTensor& tensor : checkpoint.tensors()) {
      const int64_t elements = tensor.numel();
      if (tensor.kind != TensorKind::kParam || tensor.shape.size() < 2) continue;
      wanted = tensor.name;
      bytes.resize(static_cast<size_t>(elements) * SizeOf(tensor.dtype));
      SALA_RETURN_IF_ERROR(checkpoint.ReadRaw(tensor, 0, elements, bytes.data()));
      break;
    }
  }
  SALA_ASSIGN_OR_RETURN(std::string content, ReadFile(directory + "/" + file));
  const size_t at = content.find(std::string_view(bytes.data(), bytes.size()));
  if (wanted.empty() || at == std::string::npos) {
    return MakeError(ExitCode::kData, "CKPT-TENSOR",
                     directory + "/" + file + ": no tensor found to damage");
  }
  content[at + bytes.size() / 2] = static_cast<char>(content[at + bytes.size() / 2] ^ 4);
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/" + file, content));
  return wanted;
}

Status OpenAndVerify(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  return checkpoint.Verify(VerifyLevel::kDeep);
}

// That a flipped bit in a copy is found, and named by file and tensor.
Status DamageIsFound(const VerifyContext& context, VerifyRow* row) {
  SALA_ASSIGN_OR_RETURN(const std::string run, StraightRun(context, false));
  SALA_ASSIGN_OR_RETURN(const SavedStep last,
                        FinalOf(run, context.scaled->config.stages.back().name));
  const std::string& good = last.directory;
  SALA_RETURN_IF_ERROR(OpenAndVerify(good));
  const std::string copy = context.directory + "/damaged/" + BaseName(good);
  SALA_RETURN_IF_ERROR(CopyTree(good, copy));
  const std::string file = "model-00000.h5";
  SALA_ASSIGN_OR_RETURN(const std::string tensor, DamageOneBit(copy, file));
  const Status found = OpenAndVerify(copy);
  const std::string text = MessageOf(found);
  if (found.ok() || text.find(file) == std::string::npos ||
      text.find(tensor) == std::string::npos) {
    row->Fail("control: one bit of " + tensor + " in " + file + " was turned over, and the check " +
              (found.ok() ? "found nothing" : "said only: " + text));
  }
  return OkStatus();
}

}  // namespace

StatusOr<VerifyRow> VerifyResume(const VerifyContext& context) {
  VerifyRow row;
  BitCount count;
  SALA_ASSIGN_OR_RETURN(const std::string run, StraightRun(context, true));
  SALA_ASSIGN_OR_RETURN(const std::vector<SavedStep> steps, SavedSteps(run));
  int64_t resumed = 0;
  std::optional<SavedStep> control;
  for (const SavedStep& step : steps) {
    if (context.interrupted()) return row;
    if (step.position.phase_step != kMiddle || step.position.stage_final) continue;
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> found,
                          ResumeAt(context, run, step, nullptr, &count));
    for (const std::string& line : found) row.Fail(line);
    ++resumed;
    if (!control) control = step;
  }
  if (!control) {
    return MakeError(ExitCode::kInternal, "INTERNAL",
                     run + ": no phase was saved after step " + std::to_string(kMiddle));
  }
  SALA_RETURN_IF_ERROR(StopAndGoOn(context, &count, &row));
  Flip flip;
  BitCount ignored;
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> found,
                        ResumeAt(context, run, *control, &flip, &ignored));
  if (ignored.other == 0) {
    row.Fail("control: one bit of " + flip.tensor + " (exp_avg), element " +
             std::to_string(flip.element) +
             ", was changed before the resume, and the runs are still equal: the check is blind");
  }
  row.compared =
      "straight runs with runs stopped in the middle and resumed: " + std::to_string(resumed) +
      " phases, and a stop by signal";
  row.measured = BitsText(count) + "; control: one bit of one moment changed " +
                 std::to_string(ignored.other) + " tensors";
  row.bound = "equal bits; the control differs";
  return row;
}

StatusOr<VerifyRow> VerifySaves(const VerifyContext& context) {
  VerifyRow row;
  BitCount count;
  SALA_ASSIGN_OR_RETURN(const std::string never, StraightRun(context, false));
  SALA_ASSIGN_OR_RETURN(const std::string always, StraightRun(context, true));
  SALA_RETURN_IF_ERROR(CompareRuns("saving every step", context, never, always, &count, &row));
  row.compared = "a run that saves every step with one that saves at the end of stages";
  row.measured = BitsText(count);
  row.bound = "equal bits";
  return row;
}

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

StatusOr<VerifyRow> VerifyCheckpoints(const VerifyContext& context) {
  VerifyRow row;
  SALA_RETURN_IF_ERROR(DamageIsFound(context, &row));
  const std::string root = context.user_run + "/checkpoints";
  int64_t verified = 0;
  int64_t whole = 0;
  if (IsDirectory(root)) {
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(root));
    for (const std::string& name : names) {
      if (context.interrupted()) return row;
      if (name.rfind("step-", 0) != 0) continue;
      context.progress("checkpoints: " + root + "/" + name);
      const Status status = OpenAndVerify(root + "/" + name);
      // A run that goes on may have pruned it meanwhile.
      if (!status.ok() && !PathExists(root + "/" + name)) continue;
      ++verified;
      if (status.ok()) {
        ++whole;
      } else {
        row.Fail(MessageOf(status));
      }
    }
  }
  row.compared = "checksums, cover and finiteness of " + std::to_string(verified) +
                 " checkpoints in " + context.user_run + ", and of a copy with one bit changed";
  if (verified == 0) row.notes.push_back(root + " holds no checkpoint yet");
  row.measured = std::to_string(whole) + " of " + std::to_string(verified) + " are whole";
  row.bound = "all whole; the copy is found out";
  return row;
}

const char* NameOf(Verdict verdict) {
  switch (verdict) {
    case Verdict::kHolds:
      return "holds";
    case Verdict::kFails:
      return "FAILS";
    default:
      return "not checked";
  }
}

const std::vector<VerifyCheck>& VerifyChecks() {
  static const std::vector<VerifyCheck> checks = {
      {"gradients", "every tensor's gradient against a float64 reference", VerifyGradients},
      {"packed", "packed documents against each document alone", VerifyPacked},
      {"updates", "learning rates, moments and parameters against AdamW in float64", VerifyUpdates},
      {"resume", "runs that were stopped and resumed against runs that were not", VerifyResume},
      {"saves", "saving every step against saving at the end", VerifySaves},
      {"ranks", "one rank against several, under mpirun", VerifyRanks},
      {"export", "exported folders read back", VerifyExport},
      {"checkpoints", "a damaged checkpoint is found; those of run.dir are whole",
       VerifyCheckpoints}};
  return checks;
}

}  // namespace sala::recipes
