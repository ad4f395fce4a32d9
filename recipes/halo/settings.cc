#include "recipes/halo/settings.h"

#include <algorithm>
#include <string>
#include <utility>

#include "recipes/halo/select.h"
#include "recipes/halo/transfer.h"

namespace sala::recipes {
namespace {

Status HaloError(const std::string& text) { return MakeError(ExitCode::kConfig, "CFG-HALO", text); }

Status CheckScoring(const StageConfig& stage) {
  const HaloConfig& halo = *stage.halo;
  const bool scored = NeedsLayerScores(halo.selector) || halo.selector == Selector::kGreedy;
  if (NeedsRecall(halo.selector) && halo.score.recall_items < 2) {
    return HaloError("halo.selector " + std::string(NameOf(halo.selector)) +
                     " ranks layers by recall, but halo.score.recall_items is " +
                     std::to_string(halo.score.recall_items) +
                     "; ask for 2 or more, or use selector kl_swap");
  }
  if (scored && !(stage.data.validation.fraction > 0)) {
    return HaloError("halo.selector " + std::string(NameOf(halo.selector)) +
                     " scores layers on held-out text, but data.validation.fraction is 0; hold "
                     "some documents out, or "
                     "use selector uniform or explicit");
  }
  return OkStatus();
}

Status CheckLogitScale(const StageConfig& stage) {
  const HaloConfig& halo = *stage.halo;
  if (halo.logit_scale_grid.empty()) {
    return halo.logit_scale_length_tokens == 0
               ? OkStatus()
               : HaloError(
                     "halo.logit_scale_length_tokens is set without halo.logit_scale_grid; give "
                     "the candidates, or "
                     "remove it");
  }
  if (std::any_of(halo.logit_scale_grid.begin(), halo.logit_scale_grid.end(),
                  [](double a) { return !(a > 1); })) {
    return HaloError(
        "halo.logit_scale_grid: every candidate must be larger than 1 (the scale divides by log "
        "a); no scale "
        "is always a candidate");
  }
  if (halo.logit_scale_length_tokens < 2) {
    return HaloError(
        "halo.logit_scale_grid needs halo.logit_scale_length_tokens, the length of the documents "
        "of the fit; "
        "4 to 16 times the training length is usual");
  }
  if (!(stage.data.validation.fraction > 0)) {
    return HaloError(
        "halo.logit_scale_grid is fitted on held-out documents, but data.validation.fraction is 0");
  }
  return OkStatus();
}

std::string FrozenLayersWarning(const HaloConfig& halo, const model::ModelConfig& teacher) {
  if (halo.trainable != HaloTrainable::kLinearMixers) return "";
  std::string change;
  if (halo.nope_at == HaloMoment::kDistil) {
    change = "lose their rotary embedding (nope_at: distil)";
  } else if (halo.softmax_gate_at == HaloMoment::kDistil &&
             halo.softmax_gate_init == GateInit::kSmallNormal) {
    change = "get a random gate (softmax_gate_at: distil)";
  } else if (teacher.attn_qk_norm && halo.softmax_qk_norm == QkNormForm::kFold &&
             halo.qk_norm_fold_at == HaloMoment::kDistil) {
    change = "lose their query/key norm (qk_norm_fold_at: distil)";
  } else {
    return "";
  }
  return "halo.trainable is linear_mixers while softmax layers " + change +
         ": these layers are frozen and cannot adapt, which for the rotary embedding gave 4 to 9 "
         "times the KL in trials; use next_stage, or trainable: all";
}

}  // namespace

StatusOr<HaloPlan> PlanHalo(const StageConfig& stage, const model::ModelConfig& teacher) {
  SALA_RETURN_IF_ERROR(CheckTeacher(teacher, stage.halo->align_from_teacher));
  SALA_RETURN_IF_ERROR(CheckScoring(stage));
  SALA_RETURN_IF_ERROR(CheckLogitScale(stage));
  const HaloConfig& halo = *stage.halo;
  const int64_t layers = teacher.num_hidden_layers;
  HaloPlan plan;
  SALA_ASSIGN_OR_RETURN(plan.forced, ResolveLayers(halo.keep, layers, "halo.keep"));
  const auto forced = static_cast<int64_t>(plan.forced.size());

  if (halo.selector == Selector::kExplicit) {
    SALA_ASSIGN_OR_RETURN(plan.explicit_layers,
                          ResolveLayers(halo.explicit_layers, layers, "halo.explicit_layers"));
    const std::vector<int64_t> all = TakeLayers(plan.explicit_layers, plan.forced, layers);
    const auto count = static_cast<int64_t>(all.size());
    if (halo.softmax_layers != 0 && halo.softmax_layers != count) {
      return HaloError("halo.explicit_layers and halo.keep name " + std::to_string(count) +
                       " layers, halo.softmax_layers says " + std::to_string(halo.softmax_layers) +
                       "; make them agree");
    }
    plan.softmax_layers = count;
    plan.layer_0_may_be_linear = all.empty() || all.front() != 0;
    return plan;
  }

  const bool automatic = halo.softmax_layers == 0;
  plan.softmax_layers = automatic ? layers / 4 : halo.softmax_layers;
  if (plan.softmax_layers > layers) {
    return HaloError("halo.softmax_layers is " + std::to_string(plan.softmax_layers) +
                     ", the teacher has " + std::to_string(layers) + " layers");
  }
  if (forced > plan.softmax_layers) {
    return HaloError(
        "halo.keep names " + std::to_string(forced) + " layers, but only " +
        std::to_string(plan.softmax_layers) + " may keep softmax attention (halo.softmax_layers" +
        (automatic ? ", by default a quarter of the " + std::to_string(layers) + " layers" : "") +
        "); raise softmax_layers or keep fewer");
  }
  plan.layer_0_may_be_linear =
      plan.softmax_layers < layers && (plan.forced.empty() || plan.forced.front() != 0);
  return plan;
}

std::vector<std::string> HaloWarnings(const HaloConfig& halo, const HaloPlan& plan,
                                      const model::ModelConfig& teacher) {
  std::vector<std::string> warnings;
  if (std::string frozen = FrozenLayersWarning(halo, teacher); !frozen.empty())
    warnings.push_back(std::move(frozen));
  if (plan.softmax_layers == 0) {
    warnings.emplace_back(
        "no layer keeps softmax attention (halo.softmax_layers, by default a quarter of the layers "
        "rounded down): a model of linear layers alone recalls badly; set halo.softmax_layers");
  }
  if (plan.layer_0_may_be_linear) {
    warnings.emplace_back(
        "layer 0 may become linear: the reference implementation counts the tokens of its cache "
        "by layer 0, which a linear layer does not fill; put 0 into halo.keep if the result shall "
        "generate there");
  }
  if (teacher.attn_qk_norm && plan.softmax_layers > 0 &&
      halo.softmax_qk_norm == QkNormForm::kKeep) {
    warnings.emplace_back(
        "halo.softmax_qk_norm is keep: the hybrid's softmax layers keep the teacher's query/key "
        "norm, and no exported format has a place for it (EXP-QKNORM), so the result trains and "
        "generates in this program only; use fold for one that can be exported");
  }
  return warnings;
}

}  // namespace sala::recipes
