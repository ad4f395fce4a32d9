// The checks of `sala verify` of runs that are stopped, resumed and saved (recipes/verify.h).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "core/checkpoint.h"
#include "core/file.h"
#include "recipes/verify_compare.h"
#include "recipes/verify_run.h"

namespace sala::recipes {
namespace {

constexpr int64_t kMiddle = kVerifySteps / 2;  // the step after which a phase is stopped

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

}  // namespace sala::recipes
