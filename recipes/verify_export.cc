// The check of `sala verify` that exported folders are what they were written from
// (recipes/verify.h).
#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/file.h"
#include "model/loss.h"
#include "recipes/export.h"
#include "recipes/verify.h"
#include "recipes/verify_pass.h"
#include "recipes/verify_tensors.h"

namespace sala::recipes {
namespace {

using model::ParameterSpec;
using model::ParameterStore;

// One rounding to bfloat16, worked out from the two neighbours: the nearer one, of two equally near
// the one whose last bit is 0.
bool IsRoundedOnce(float value, float rounded) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t below = bits & 0xffff0000U;  // towards zero
  const float low = std::bit_cast<float>(below);
  const float high = std::bit_cast<float>(below + 0x10000U);
  const double to_low = std::abs(static_cast<double>(value) - low);
  const double to_high = std::abs(static_cast<double>(high) - value);
  const bool take_low = to_low < to_high || (to_low == to_high && (below & 0x10000U) == 0);
  return std::bit_cast<uint32_t>(rounded) == std::bit_cast<uint32_t>(take_low ? low : high);
}

// Tensors of `params` in a folder that was read back; every one must be as `same` says.
void CompareFolder(const std::string& where, const ParameterStore& params, const HfFolder& folder,
                   bool (*same)(float, float), VerifyRow* row) {
  for (const ParameterSpec& spec : params.specs()) {
    if (!folder.params.Has(spec.name)) {
      row->Fail(where + ": " + Named(spec.name) + " is not in the exported folder");
      continue;
    }
    const float* expected = params.data() + spec.offset;
    const float* found = folder.params.data() + folder.params.Spec(spec.name).offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (same(expected[i], found[i])) continue;
      row->Fail(where + ": " + Named(spec.name) + ": element " + std::to_string(i) + ": exported " +
                ExactText(expected[i]) + ", read back " + ExactText(found[i]));
      break;
    }
  }
}

bool SameBits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// EXP-QKNORM is returned: the model has no place in the format.
Status RoundTrip(Host& host, const std::string& directory, VerifyPass& pass, VerifyRow* row) {
  for (const WeightType dtype : {WeightType::kF32, WeightType::kBF16}) {
    const bool f32 = dtype == WeightType::kF32;
    const std::string folder = directory + "/" + std::string(NameOf(dtype));
    SALA_RETURN_IF_ERROR(MakeDirectories(directory));
    SALA_RETURN_IF_ERROR(ExportModel(pass.plan.model, pass.params, nullptr, {},
                                     {.directory = folder, .dtype = dtype, .verify = true})
                             .status());
    SALA_ASSIGN_OR_RETURN(HfFolder loaded, LoadHfFolder(folder));
    CompareFolder(pass.where + ", " + std::string(NameOf(dtype)), pass.params, loaded,
                  f32 ? SameBits : IsRoundedOnce, row);
    if (!f32) continue;
    const auto loss = [&](const model::ModelConfig& config, ParameterStore& params) {
      return model::EvaluateCrossEntropy(host.ctx, host.arena, model::Model(config, params),
                                         pass.batch, pass.options())
          .loss_sum;
    };
    const double before = loss(pass.plan.model, pass.params);
    const double after = loss(loaded.config, loaded.params);
    if (std::bit_cast<uint64_t>(before) != std::bit_cast<uint64_t>(after)) {
      row->Fail(pass.where + ": loss of the exported model: before " + ExactText(before) +
                ", read back " + ExactText(after));
    }
  }
  return OkStatus();
}

// The passes of the models that stages hand on. What a HALO stage without a finetuning phase hands
// on has no pass of its own: its distillation's stands for it, with the model as the stage leaves
// it.
StatusOr<std::vector<VerifyPass>> HandedOn(const ScaledPipeline& scaled) {
  SALA_ASSIGN_OR_RETURN(std::vector<VerifyPass> passes, MakeVerifyPasses(scaled));
  std::vector<VerifyPass> left;
  model::ModelConfig model = scaled.start;
  for (const StageConfig& stage : scaled.config.stages) {
    SALA_RETURN_IF_ERROR(PlanStage(stage, scaled.config.run, 1, &model).status());
    if (stage.kind != StageKind::kHalo || stage.halo->finetune) continue;
    const auto distil = std::find_if(passes.begin(), passes.end(), [](const VerifyPass& pass) {
      return pass.plan.phase == PlanPhase::kDistil;
    });
    SALA_CHECK(distil != passes.end()) << "a HALO stage distils";
    VerifyPass& pass = left.emplace_back(*distil);
    pass.where = "stage " + stage.name + ", handed on";
    pass.plan.phase = PlanPhase::kFinetune;
    pass.plan.model = model;
    DrawWeights(0, &pass);
  }
  // Between the phases of HALO the model is a mixture that is not handed on.
  std::erase_if(passes, [](const VerifyPass& pass) {
    return pass.plan.phase == PlanPhase::kAlign || pass.plan.phase == PlanPhase::kDistil;
  });
  std::move(left.begin(), left.end(), std::back_inserter(passes));
  return passes;
}

}  // namespace

StatusOr<VerifyRow> VerifyExport(const VerifyContext& context) {
  SALA_ASSIGN_OR_RETURN(std::vector<VerifyPass> passes, HandedOn(*context.scaled));
  VerifyRow row;
  Host host;
  std::set<std::string> seen;
  int64_t models = 0;
  int64_t tensors = 0;
  for (VerifyPass& pass : passes) {
    if (context.interrupted()) return row;
    if (!seen.insert(EmitConfig(pass.plan.model)).second) continue;
    context.progress("export: the model of " + pass.where);
    const Status status =
        RoundTrip(host, context.directory + "/export-" + std::to_string(seen.size()), pass, &row);
    if (ErrorCodeOf(status) == "EXP-QKNORM") {
      row.notes.push_back("the model of " + pass.where + " was not checked: " + MessageOf(status));
      continue;
    }
    SALA_RETURN_IF_ERROR(status);
    ++models;
    tensors += static_cast<int64_t>(pass.params.specs().size());
  }
  row.compared = "exported folders, f32 and bf16, with what they were written from: " +
                 std::to_string(models) + " models, " + std::to_string(tensors) + " tensors";
  if (models == 0) {
    row.verdict = Verdict::kNotChecked;
    return row;
  }
  row.measured = row.verdict == Verdict::kHolds ? "f32 and losses of equal bits, bf16 rounded once"
                                                : "see below";
  row.bound = "equal bits";
  return row;
}

}  // namespace sala::recipes
