// The check `updates` of `sala verify`: every update of a run against AdamW in float64.
#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>
#include <utility>

#include "core/checkpoint.h"
#include "core/elementary.h"
#include "model/parameters.h"
#include "recipes/verify_pass.h"
#include "recipes/verify_run.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

// What decides the updates of a phase.
struct PhaseSettings {
  const BatchConfig* batch;
  const ScheduleConfig* schedule;
  const OptimizerConfig* optimizer;
};

PhaseSettings SettingsOf(const StageConfig& stage, const std::string& phase) {
  if (!stage.halo) return {&stage.batch, &stage.schedule, &stage.optimizer};
  const HaloPhaseConfig& of_phase = phase == "align"    ? stage.halo->align
                                    : phase == "distil" ? stage.halo->distil
                                                        : *stage.halo->finetune;
  return {&of_phase.batch, &of_phase.schedule, &of_phase.optimizer};
}

// The learning rate of a phase's step, counted from 0 (docs/configuration.md).
double ExpectedRate(const PhaseSettings& phase, int64_t step) {
  const ScheduleConfig& s = *phase.schedule;
  const auto at = static_cast<double>(step);
  const auto warmup = static_cast<double>(s.warmup_steps);
  if (at < warmup) return at * (s.peak_lr / warmup);
  const double x = (at - warmup) / (static_cast<double>(phase.batch->steps) - warmup);
  switch (s.shape) {
    case ScheduleShape::kConstant:
      break;
    case ScheduleShape::kExponential:
      return PortablePow(s.peak_lr, 1 - x) * PortablePow(s.final_lr, x);
    case ScheduleShape::kLinear:
      return s.peak_lr * (1 - x) + s.final_lr * x;
    case ScheduleShape::kCosine: {
      const double half = PortableSinCos(0.5 * std::numbers::pi * x).cos;
      return s.final_lr + (s.peak_lr - s.final_lr) * half * half;
    }
  }
  return s.peak_lr;
}

// A tensor's part of the learning rate, and its weight decay.
struct TensorRates {
  double rate = 1;
  double decay = 0;
};

TensorRates RatesOf(const OptimizerConfig& o, const model::ModelConfig& config,
                    const model::ParameterSpec& spec) {
  TensorRates rates;
  switch (spec.kind) {
    case model::ParameterKind::kMatrix: {
      const double of_width = config.dim_model_base / static_cast<double>(config.hidden_size);
      rates = {o.matrix_lr_multiplier > 0 ? o.matrix_lr_multiplier : of_width, o.weight_decay};
      break;
    }
    case model::ParameterKind::kVector:
      rates.rate = o.vector_lr_multiplier;
      break;
    case model::ParameterKind::kEmbedding:
      rates.rate = o.embedding_lr_multiplier;
      break;
    case model::ParameterKind::kHead:
      rates = {o.head_lr_multiplier, o.weight_decay};
      break;
  }
  const std::string layer = LayerOfTensor(spec.name);
  if (!layer.empty() && spec.name.find(".self_attn.") != std::string::npos &&
      config.mixer(std::stoll(layer.substr(layer.find(' ')))) == model::MixerType::kLightning)
    rates.rate *= o.mixer_lr_multiplier;
  return rates;
}

// A float32 tensor with its moments.
struct Moments {
  std::vector<float> param, exp_avg, exp_avg_sq;
};

struct SavedState {
  int64_t updates = 0;
  model::ModelConfig model;
  std::map<std::string, Moments> tensors;
};

StatusOr<SavedState> ReadState(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  SavedState state;
  state.updates = checkpoint.info().trainer.value("updates", int64_t{0});
  SALA_ASSIGN_OR_RETURN(state.model, ModelConfigOf(checkpoint));
  for (const StoredTensor& tensor : checkpoint.tensors()) {
    Moments& moments = state.tensors[tensor.name];
    std::vector<float>* values = tensor.kind == TensorKind::kParam      ? &moments.param
                                 : tensor.kind == TensorKind::kExpAvg   ? &moments.exp_avg
                                 : tensor.kind == TensorKind::kExpAvgSq ? &moments.exp_avg_sq
                                                                        : nullptr;
    if (values == nullptr || tensor.dtype != DType::kF32) continue;
    values->resize(static_cast<size_t>(tensor.numel()));
    SALA_RETURN_IF_ERROR(checkpoint.ReadRaw(tensor, 0, tensor.numel(), values->data()));
  }
  return state;
}

// One update of a run against AdamW in float64. Bounds are the most that the roundings of float32
// can make, e = 2^-24 each, of constants as of results:
//   m' = b1 m + (1 - b1) g     constants, products, sum: e (2 |b1 m| + 2 |(1 - b1) g| + |m'|),
//   which
//                              is at most e (4 |b1 m| + 3 |m'|), and so in g what that makes
//   v' = b2 v + (1 - b2) g^2   a square more: e (2 b2 v + 4 v'), and what the bound of g makes
//   p' = p - step - decay p    step = lr / c1 m' / (sqrt(v') / sqrt(c2) + eps): three constants,
//   root,
//                              two products, quotient, two sums; decay p: a constant, a product, a
//                              sum; last e |p'|
class UpdateCheck {
 public:
  UpdateCheck(const PhaseSettings& phase, const SavedState& before, const SavedState& after,
              std::string where, VerifyRow* row)
      : phase_(phase),
        before_(before),
        after_(after),
        where_(std::move(where)),
        row_(row),
        c1_(1 - PortablePow(phase.optimizer->beta1, static_cast<double>(after.updates))),
        c2_(1 - PortablePow(phase.optimizer->beta2, static_cast<double>(after.updates))) {}

  // `line`: the step's metrics; `rate`: its learning rate; `all_trained`: no tensor may stand
  // still.
  void Run(const json& line, double rate, bool all_trained) {
    rate_ = rate;
    for (const model::ParameterSpec& spec : model::ParameterSpecs(after_.model)) {
      const auto a = before_.tensors.find(spec.name);
      const auto b = after_.tensors.find(spec.name);
      if (a == before_.tensors.end() || b == after_.tensors.end()) continue;
      Tensor(spec, a->second, b->second, all_trained);
    }
    const double clip = phase_.optimizer->clip_norm;
    const double norm = line.value("grad_norm", std::nan(""));
    clipped_ = clip > 0 && norm > clip;
    const double expected = clipped_ ? clip : norm;
    // Each gradient was multiplied by a factor in float32; the rest is in the moments' bounds.
    const double bound = std::sqrt(squared_bounds_) + 3 * kRounding * expected;
    if (!(std::abs(std::sqrt(squares_) - expected) <= bound)) {
      Fail("the gradient that the moments took has norm " + ExactText(std::sqrt(squares_)) +
           ", expected " + ExactText(expected) + " (norm " + ExactText(norm) + ", clip_norm " +
           ExactText(clip) + ")");
    }
  }

  bool clipped() const { return clipped_; }
  int64_t tensors() const { return tensors_; }
  double largest() const { return largest_; }  // error, as a part of its bound

 private:
  static constexpr double kRounding = 0x1p-24;
  // Of small gradients, whose squares may be subnormal numbers: three roundings of 2^-150.
  static constexpr double kSmallest = 3 * 0x1p-150;

  void Fail(const std::string& what) { row_->Fail(where_ + ": " + what); }

  void Tensor(const model::ParameterSpec& spec, const Moments& a, const Moments& b,
              bool all_trained) {
    const size_t n = b.param.size();
    if (a.param.size() != n || a.exp_avg.size() != n || b.exp_avg.size() != n ||
        a.exp_avg_sq.size() != n || b.exp_avg_sq.size() != n)
      return;
    ++tensors_;
    const auto is_zero = [](float x) { return x == 0; };
    if (std::all_of(b.exp_avg.begin(), b.exp_avg.end(), is_zero)) {
      if (all_trained) Fail(spec.name + " has no moments: it is not trained");
      if (a.param != b.param) Fail(spec.name + " has no moments and has changed");
      return;
    }
    const OptimizerConfig& o = *phase_.optimizer;
    const TensorRates rates = RatesOf(o, after_.model, spec);
    for (size_t i = 0; i < n; ++i) {
      const double kept = o.beta1 * a.exp_avg[i];
      const double m = b.exp_avg[i];
      const double gradient = (m - kept) / (1 - o.beta1);
      const double of_gradient =
          (kRounding * (4 * std::abs(kept) + 3 * std::abs(m)) + kSmallest) / (1 - o.beta1);
      squares_ += gradient * gradient;
      squared_bounds_ += of_gradient * of_gradient;

      const double kept_square = o.beta2 * a.exp_avg_sq[i];
      const double v = b.exp_avg_sq[i];
      const double square_bound =
          kRounding * (2 * kept_square + 4 * v) + kSmallest +
          (1 - o.beta2) * of_gradient * (2 * std::abs(gradient) + of_gradient);
      if (!Close(spec, i, "exp_avg_sq", v, kept_square + (1 - o.beta2) * gradient * gradient,
                 square_bound))
        return;

      const double step = rate_ * rates.rate * (m / c1_) / (std::sqrt(v / c2_) + o.eps);
      const double decay = rate_ * rates.rate * rates.decay * a.param[i];
      const double bound =
          kRounding * (std::abs(b.param[i]) + 9 * std::abs(step) + 3 * std::abs(decay));
      if (!Close(spec, i, "param", b.param[i], a.param[i] - step - decay, bound)) return;
    }
  }

  bool Close(const model::ParameterSpec& spec, size_t element, const char* kind, double found,
             double expected, double bound) {
    const double difference = std::abs(found - expected);
    if (difference > 0) largest_ = std::max(largest_, difference / bound);
    if (difference <= bound) return true;
    Fail(spec.name + " (" + kind + "): element " + std::to_string(element) + ": found " +
         ExactText(found) + ", expected " + ExactText(expected) + ", at most " + ShortText(bound) +
         " apart");
    return false;
  }

  const PhaseSettings& phase_;
  const SavedState& before_;
  const SavedState& after_;
  std::string where_;
  VerifyRow* row_;
  double c1_, c2_;
  double rate_ = 0;
  double squares_ = 0, squared_bounds_ = 0;
  bool clipped_ = false;
  int64_t tensors_ = 0;
  double largest_ = 0;
};

// The pipeline with clip_norm at the middle of each phase's gradient norms, where it is not 0, so
// that some updates are clipped and some are not; `metrics` of a run without the change.
PipelineConfig WithClipping(PipelineConfig config, const std::map<StepKey, json>& metrics) {
  std::map<std::pair<std::string, std::string>, std::vector<double>> norms;  // by stage, phase
  for (const auto& [key, line] : metrics)
    norms[{std::get<1>(key), std::get<2>(key)}].push_back(line.value("grad_norm", 0.0));
  const auto lower = [&](const StageConfig& stage, const char* phase, OptimizerConfig* optimizer) {
    std::vector<double>& of_phase = norms[{stage.name, phase}];
    if (of_phase.empty() || optimizer->clip_norm == 0) return;
    std::sort(of_phase.begin(), of_phase.end());
    const double middle = of_phase[of_phase.size() / 2];
    if (middle > 0) optimizer->clip_norm = std::min(optimizer->clip_norm, middle);
  };
  for (StageConfig& stage : config.stages) {
    if (!stage.halo) {
      lower(stage, "train", &stage.optimizer);
      continue;
    }
    lower(stage, "align", &stage.halo->align.optimizer);
    lower(stage, "distil", &stage.halo->distil.optimizer);
    if (stage.halo->finetune) lower(stage, "finetune", &stage.halo->finetune->optimizer);
  }
  return config;
}

// The rates of all steps of a run.
void CheckRates(const PipelineConfig& config, const std::map<StepKey, json>& metrics,
                VerifyRow* row) {
  for (const auto& [key, line] : metrics) {
    const auto& [global_step, stage_name, phase_name] = key;
    const auto stage = std::find_if(
        config.stages.begin(), config.stages.end(),
        [&name = stage_name](const StageConfig& candidate) { return candidate.name == name; });
    if (stage == config.stages.end() || !line.contains("lr")) continue;
    const PhaseSettings phase = SettingsOf(*stage, phase_name);
    const double expected = ExpectedRate(phase, line.value("stage_step", int64_t{0}) - 1);
    // Worked out in float64: a few roundings of 1.1e-16, of powers a few more.
    constexpr double kRateBound = 1e-14;
    const double rate = line.value("lr", std::nan(""));
    if (std::abs(rate - expected) <= kRateBound * phase.schedule->peak_lr) continue;
    row->Fail(StepText(key) + ": learning rate " + ExactText(rate) + ", expected " +
              ExactText(expected));
  }
}

}  // namespace

StatusOr<VerifyRow> VerifyUpdates(const VerifyContext& context) {
  VerifyRow row;
  SALA_ASSIGN_OR_RETURN(const std::string straight, StraightRun(context, true));
  SALA_ASSIGN_OR_RETURN(const auto straight_metrics, Metrics(straight));
  PipelineConfig config = WithClipping(context.scaled->config, straight_metrics);
  SaveEveryStep(config);
  const std::string run = RunDirectory(context, "clipped");
  SALA_ASSIGN_OR_RETURN(const std::string file, WritePipeline(context, "clipped", config));
  SALA_RETURN_IF_ERROR(Train(context, "clipped", {.config = file, .run = run}));
  SALA_ASSIGN_OR_RETURN(const auto metrics, Metrics(run));
  SALA_ASSIGN_OR_RETURN(const std::vector<SavedStep> steps, SavedSteps(run));
  CheckRates(config, metrics, &row);
  int64_t updates = 0;
  int64_t clipped = 0;
  int64_t tensors = 0;
  double largest = 0;
  for (size_t i = 1; i < steps.size(); ++i) {
    if (context.interrupted()) return row;
    const StagePosition& from = steps[i - 1].position;
    const StagePosition& to = steps[i].position;
    if (from.stage_index != to.stage_index || from.phase != to.phase ||
        from.phase_step + 1 != to.phase_step)
      continue;
    const StageConfig& stage = config.stages[static_cast<size_t>(to.stage_index)];
    const StepKey key = {steps[i].global_step, to.stage, to.phase};
    const std::string where = StepText(key);
    const auto line = metrics.find(key);
    if (line == metrics.end()) {
      row.Fail(where + " is not in the metrics");
      continue;
    }
    SALA_ASSIGN_OR_RETURN(const SavedState before, ReadState(steps[i - 1].directory));
    SALA_ASSIGN_OR_RETURN(const SavedState after, ReadState(steps[i].directory));
    const bool carried = !stage.halo && stage.carry_optimizer;
    if (after.updates != before.updates + 1 || (!carried && after.updates != to.phase_step)) {
      row.Fail(where + ": the optimizer has counted " + std::to_string(after.updates) +
               " updates, before it " + std::to_string(before.updates));
    }
    const PhaseSettings phase = SettingsOf(stage, to.phase);
    UpdateCheck check(phase, before, after, where, &row);
    check.Run(line->second, ExpectedRate(phase, to.phase_step - 1), !stage.halo);
    ++updates;
    clipped += check.clipped() ? 1 : 0;
    tensors += check.tensors();
    largest = std::max(largest, check.largest());
  }
  if (tensors == 0) row.Fail(run + ": no two saved steps in a row with parameters and moments");
  row.compared =
      "learning rates, clipping, moments and parameters of a run with AdamW in "
      "float64: " +
      std::to_string(updates) + " updates, " + std::to_string(tensors) + " tensors";
  row.measured = "moments and parameters are off by " + ShortText(largest) +
                 " of the most that float32 rounds";
  row.bound = "1";
  row.notes.push_back(std::to_string(clipped) +
                      " of the updates were clipped: clip_norm was lowered for that");
  return row;
}

}  // namespace sala::recipes
