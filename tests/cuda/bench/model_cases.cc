#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cuda_module.h"
#include "kernels/cuda_kernels.h"
#include "model/loss.h"
#include "model/model.h"
#include "model/work.h"
#include "nlohmann/json.hpp"
#include "tests/cuda/bench/cases.h"
#include "tests/cuda/bench/shapes.h"

namespace sala::bench {
namespace {

// Longer calls are not made: a run must end within minutes.
constexpr double kMostSeconds = 240;
// What a call is expected to reach of the product rate, for that estimate only.
constexpr double kExpectedRate = 0.25;

// One document, every token but the last with a label.
model::Batch RandomDocument(int64_t tokens, int64_t vocabulary) {
  model::Batch batch;
  batch.tokens = Bench::RandomIds(tokens, vocabulary);
  batch.labels.assign(batch.tokens.begin() + 1, batch.tokens.end());
  batch.labels.push_back(-1);
  batch.positions.resize(batch.tokens.size());
  std::iota(batch.positions.begin(), batch.positions.end(), 0);
  batch.cu_seqlens = {0, static_cast<int32_t>(tokens)};
  return batch;
}

// Parameters as the model computes with them, and, for training, gradients, masters and moments.
struct State {
  State(const model::ModelConfig& config, Device& device, bool training)
      : parameters(model::ParameterSpecs(config), DType::kBF16, &device) {
    if (!training) return;
    for (auto* store : {&gradients, &masters, &exp_avg, &exp_avg_sq})
      *store = model::ParameterStore(parameters.specs(), DType::kF32, &device);
  }
  model::ParameterStore parameters, gradients, masters, exp_avg, exp_avg_sq;
};

double StateBytes(const model::ModelConfig& config, bool training) {
  std::vector<model::ParameterSpec> specs = model::ParameterSpecs(config);
  return (training ? 18.0 : 2.0) * static_cast<double>(model::LayOut(specs));
}

constexpr float kScale = 0.043F;  // the standard deviation of this uniform draw is 0.025

// Matrices as at the start of training, norm weights 1.
void Initialise(Bench& bench, State& state, bool training) {
  bench.Fill(state.parameters.Flat(), kScale);
  Arena arena(size_t{1} << 20, &bench.device());
  if (training) bench.Fill(state.masters.Flat(), kScale);
  for (const model::ParameterSpec& spec : state.parameters.specs()) {
    if (spec.kind != model::ParameterKind::kVector) continue;
    model::ParameterStore& store = training ? state.masters : state.parameters;
    const Tensor ones = bench.Ones(arena, store.dtype(), spec.numel);
    kernels::Cast(bench.ctx(), ones, store.Flat(spec.offset, spec.offset + spec.numel));
  }
  if (training) kernels::Cast(bench.ctx(), state.masters.Flat(), state.parameters.Flat());
}

// Forward and backward pass, gradient norm, AdamW on everything. Returns the loss per token.
double Step(const Context& ctx, Arena& arena, const model::Model& model, const model::Batch& batch,
            const model::RunOptions& options, State& state) {
  state.gradients.Zero();
  const auto targets = static_cast<double>(batch.targets());
  const auto loss =
      model::CrossEntropyStep(ctx, arena, model, batch, options, static_cast<float>(1 / targets),
                              model::BindTensors(model.config(), state.gradients));
  const double norm = std::sqrt(kernels::SumOfSquares(ctx, state.gradients.Flat()));
  kernels::AdamWStep(ctx, state.masters.Flat(), state.gradients.Flat(), state.exp_avg.Flat(),
                     state.exp_avg_sq.Flat(),
                     {.learning_rate = 1e-5, .grad_scale = norm > 1 ? 1 / norm : 1.0},
                     state.parameters.Flat());
  return loss.loss_sum / targets;
}

// The logits of the last token.
void Prefill(const Context& ctx, Arena& arena, const model::Model& model, const model::Batch& batch,
             const model::RunOptions& options, const Tensor& logits) {
  const ArenaScope scope(arena);
  const Tensor hidden = model.ForwardOnly(ctx, arena, batch, options);
  kernels::GemmNT(ctx, hidden.Rows(batch.size() - 1, batch.size()), model.tensors().head, logits,
                  {.alpha = model.logit_scale()});
}

struct Plan {
  double state = 0;
  size_t arena = 0, scratch = 0;
  double total() const { return state + static_cast<double>(arena) + static_cast<double>(scratch); }
};

// What a call will need, found by running it on a device without memory.
Plan PlanOf(Bench& bench, const model::ModelConfig& config, const model::Batch& batch,
            const model::RunOptions& options, bool training) {
  auto opened = OpenCudaDevice({.host = "bench", .dry = true});
  SALA_CHECK(opened.ok()) << MessageOf(opened.status());
  const std::unique_ptr<Device> dry = std::move(opened).value();
  Plan plan;
  plan.state = StateBytes(config, training);
  State state(config, *dry, training);
  Arena arena(size_t{1} << 20, dry.get());
  Arena scratch(size_t{1} << 20, dry.get());
  Context ctx = bench.ctx();
  ctx.gpu = dry.get();
  ctx.scratch = &scratch;
  const model::Model model(config, state.parameters);
  if (training) {
    Step(ctx, arena, model, batch, options, state);
  } else {
    const ArenaScope scope(arena);
    const Tensor logits = arena.New(DType::kF32, {1, config.vocab_size});
    Prefill(ctx, arena, model, batch, options, logits);
  }
  plan.arena = arena.peak_bytes();
  plan.scratch = scratch.peak_bytes();
  return plan;
}

struct Kind {
  const char* name;
  model::ModelConfig (*config)(bool smoke, int64_t layers);
  bool sparse;

  model::RunOptions options() const { return {.sparse_attention = sparse, .recompute = true}; }
};
constexpr Kind kHybrid = {"hybrid", &HybridStack, true};
constexpr Kind kTeacher = {"teacher", &TeacherStack, false};

std::string LayersText(const model::ModelConfig& config) {
  const auto linear = static_cast<int64_t>(
      std::count(config.mixer_types.begin(), config.mixer_types.end(), "lightning-attn"));
  return std::to_string(config.num_hidden_layers - linear) + " softmax + " +
         std::to_string(linear) + " Lightning layers";
}

// How many calls are measured, and whether one warms up before them.
struct Repetitions {
  int samples = 5;
  bool warm = true;
};

void RunModel(Bench& bench, const Kind& kind, int64_t layers, int64_t tokens, bool training) {
  const model::ModelConfig config = kind.config(bench.smoke(), layers);
  Case what;
  what.section = training ? "steps" : "prefill";
  what.name = std::string(kind.name) + (training ? "_step" : "_prefill");
  what.tokens = tokens;
  what.shape = LayersText(config) + ", " + std::to_string(tokens) + " tokens";
  if (!bench.Wanted(what.name)) return;
  if (config.has_lightning() && kernels::Cuda(bench.ctx()).LightningForward == nullptr) {
    bench.Skip(what, "the module has no Lightning attention");
    return;
  }
  const model::ForwardWork work = model::ForwardWorkOf(config, kind.sparse, tokens);
  const double head = 2 * static_cast<double>(config.vocab_size * config.hidden_size);
  what.flops = training ? work.step() : work.forward() - head * static_cast<double>(tokens - 1);
  // A training step runs each layer's forward pass twice.
  const double expected = (training ? 4.0 / 3 : 1.0) * what.flops /
                          (kExpectedRate * std::max(1.0, bench.product_rate()));
  if (expected > kMostSeconds && !bench.smoke()) {
    bench.Skip(what, "expected to take " + std::to_string(static_cast<int>(expected)) + " s");
    return;
  }
  const Repetitions repeat = bench.smoke()     ? Repetitions{.samples = 2}
                             : expected > 20.0 ? Repetitions{.samples = 1, .warm = false}
                             : expected > 3.0  ? Repetitions{.samples = 3}
                                               : Repetitions{};
  const model::Batch batch = RandomDocument(tokens, config.vocab_size);
  const model::RunOptions options = kind.options();
  const Plan plan = PlanOf(bench, config, batch, options, training);
  bench.ResetScratch();
  {  // what the bench itself keeps on the device is there before memory is measured
    Arena arena(size_t{1} << 20, &bench.device());
    for (const DType dtype : {DType::kBF16, DType::kF32}) bench.Random(arena, dtype, {8}, kScale);
    bench.device().Synchronize();
  }
  const auto free = static_cast<double>(bench.device().free_bytes());
  if (plan.total() > 0.98 * free && !bench.smoke()) {
    bench.Skip(what, "does not fit: the plan is " + Gib(plan.total()) + ", free are " + Gib(free));
    return;
  }
  double loss = 0;
  std::vector<double> times;
  double used = 0;
  {
    bench.ResetScratch(plan.scratch);
    State state(config, bench.device(), training);
    Arena arena(size_t{1} << 20, &bench.device());
    arena.Reserve(plan.arena);
    Initialise(bench, state, training);
    const model::Model model(config, state.parameters);
    const Context ctx = bench.ctx();
    const ArenaScope scope(arena);
    const Tensor logits = training ? Tensor{} : arena.New(DType::kF32, {1, config.vocab_size});
    const auto call = [&] {
      if (training) {
        loss = Step(ctx, arena, model, batch, options, state);
      } else {
        Prefill(ctx, arena, model, batch, options, logits);
      }
    };
    if (repeat.warm) call();
    times = bench.Time(repeat.samples, call);
    used = free - static_cast<double>(bench.device().free_bytes());
    if (!training) {
      std::vector<float> host(static_cast<size_t>(config.vocab_size));
      bench.device().Download(host.data(), logits.raw(), host.size() * sizeof(float));
      loss = *std::max_element(host.begin(), host.end());
    }
  }
  bench.ResetScratch();
  bench.Add({{"section", what.section},
             {"name", what.name},
             {"shape", what.shape},
             {"tokens", tokens},
             {"layers", layers},
             {"seconds", Median(times)},
             {"low", *std::min_element(times.begin(), times.end())},
             {"high", *std::max_element(times.begin(), times.end())},
             {"samples", repeat.samples},
             {"warm", repeat.warm},
             {"flops", what.flops},
             {"plan_bytes", plan.total()},
             {"used_bytes", used},
             {training ? "loss" : "largest_logit", loss}});
}

// The deepest stack whose plan fits; 0 when none does.
int64_t LayersThatFit(Bench& bench, const Kind& kind, int64_t tokens, bool training) {
  for (const int64_t layers : {4, 2}) {
    const model::ModelConfig config = kind.config(bench.smoke(), layers);
    if (bench.smoke()) return layers;
    const Plan plan =
        PlanOf(bench, config, RandomDocument(tokens, config.vocab_size), kind.options(), training);
    if (plan.total() <= 0.98 * static_cast<double>(bench.device().free_bytes())) return layers;
  }
  return 0;
}

void Rows(Bench& bench, bool training, const std::vector<int64_t>& lengths) {
  const std::string suffix = training ? "_step" : "_prefill";
  for (const Kind& kind : {kHybrid, kTeacher}) {
    if (!bench.Wanted(kind.name + suffix)) continue;
    for (const int64_t tokens : lengths) {
      bench.ResetScratch();
      // The same depth for both models, so that their rows stand beside each other.
      const int64_t layers = LayersThatFit(bench, kHybrid, tokens, training);
      RunModel(bench, kind, layers == 0 ? 2 : layers, tokens, training);
    }
  }
}

}  // namespace

void StepCases(Bench& bench) {
  if (bench.smoke()) return Rows(bench, true, {40, 100});
  Rows(bench, true, {4096, 32768, 131072, 532480});
}

void PrefillCases(Bench& bench) {
  if (bench.smoke()) return Rows(bench, false, {100});
  Rows(bench, false, {65536, 131072, 262144, 524288});
}

}  // namespace sala::bench
