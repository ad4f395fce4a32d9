#include "recipes/verify_compare.h"

#include "recipes/verify_pass.h"
#include "recipes/verify_run.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

// Of a line of metrics, what the bits of a run decide.
constexpr const char* kStepFields[] = {"loss_hex", "grad_norm_hex", "data_crc", "lr"};

}  // namespace

std::string Named(const TensorDifference& tensor) {
  const std::string layer = LayerOfTensor(tensor.name);
  return tensor.name + " (" + (layer.empty() ? "" : layer + ", ") +
         std::string(NameOf(tensor.kind)) + ")";
}

StatusOr<std::string> FirstOtherStep(const std::string& run_a, const std::string& run_b,
                                     const StepRange& range) {
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

}  // namespace sala::recipes
