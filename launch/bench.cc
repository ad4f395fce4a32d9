// sala bench step: one training step on the CPU against the matrix products of the same model,
// measured in the same run.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "core/clock.h"
#include "core/config.h"
#include "core/rng.h"
#include "kernels/gemm/gemm.h"
#include "launch/build_info.h"
#include "launch/command.h"
#include "model/loss.h"
#include "model/model.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "recipes/optimizer.h"

namespace sala::launch {
namespace {

struct BenchOptions {
  std::string config;
  int64_t seq_len = 2048;
  int threads = 1;
  int64_t steps = 5;
  bool recompute = false;
  bool sparse = false;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

// About 15M parameters in the proportions of the released model: a quarter of the layers softmax
// with grouped queries, first and last layer among them.
model::ModelConfig DefaultModel() {
  model::ModelConfig config;
  config.vocab_size = 4096;
  config.hidden_size = 384;
  config.intermediate_size = 896;
  config.num_hidden_layers = 8;
  config.num_attention_heads = 6;
  config.num_key_value_heads = 2;
  config.head_dim = 64;
  config.tie_word_embeddings = true;
  config.attn_use_rope = false;
  config.attn_use_output_gate = true;
  config.dim_model_base = 64;
  config.scale_emb = 12;
  config.mixer_types.assign(8, "lightning-attn");
  config.mixer_types.front() = "minicpm4";
  config.mixer_types.back() = "minicpm4";
  return config;
}

StatusOr<model::ModelConfig> ReadModel(const std::string& path) {
  model::ModelConfig config = DefaultModel();
  if (!path.empty()) {
    config = model::ModelConfig();
    SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Load(path));
    SALA_RETURN_IF_ERROR(BindConfig(document, &config));
  }
  SALA_RETURN_IF_ERROR(config.Resolve());
  return config;
}

// A weight matrix [out, in] and how often the model has it.
using MatrixShapes = std::map<std::pair<int64_t, int64_t>, int64_t>;

MatrixShapes WeightShapes(const model::ModelConfig& config) {
  MatrixShapes shapes;
  for (const model::ParameterSpec& spec : model::ParameterSpecs(config)) {
    if (spec.kind == model::ParameterKind::kMatrix) ++shapes[{spec.shape[0], spec.shape[1]}];
  }
  ++shapes[{config.vocab_size,
            config.hidden_size}];  // the output head; the embedding is a look-up, no product
  return shapes;
}

int64_t MatrixParameters(const MatrixShapes& shapes) {
  int64_t n = 0;
  for (const auto& [shape, count] : shapes) n += shape.first * shape.second * count;
  return n;
}

// FLOPs of one step on one document of T tokens, without anything that is computed twice:
//   matrices  6 P T          y = x W^T and its two gradients, 2 P T each, P = elements of all
//   weight matrices and the head softmax   6 T^2 N D      per layer: Q K^T and P V over the causal
//   half (2 T^2 N D), twice that backward linear    12 T N D^2     per layer: state update and
//   read-out of the recurrence (4 T N D^2), twice that backward
struct FlopCount {
  double matrices = 0, softmax = 0, linear = 0;
  double total() const { return matrices + softmax + linear; }
};

FlopCount CountFlops(const model::ModelConfig& config, const MatrixShapes& shapes, int64_t tokens) {
  FlopCount flops;
  const auto t = static_cast<double>(tokens);
  flops.matrices = 6.0 * static_cast<double>(MatrixParameters(shapes)) * t;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (config.mixer(layer) == model::MixerType::kSoftmax) {
      flops.softmax += 6.0 * t * t * static_cast<double>(config.attention_width());
    } else {
      flops.linear +=
          12.0 * t * static_cast<double>(config.lightning_width() * config.lightning_head_dim);
    }
  }
  return flops;
}

// Seconds for all matrix products of a step at the model's own shapes: for each weight forward,
// input and weight gradient.
class GemmYardstick {
 public:
  GemmYardstick(MatrixShapes shapes, int64_t tokens) : shapes_(std::move(shapes)), tokens_(tokens) {
    int64_t in = 0;
    int64_t out = 0;
    int64_t weight = 0;
    for (const auto& [shape, count] : shapes_) {
      out = std::max(out, shape.first);
      in = std::max(in, shape.second);
      weight = std::max(weight, shape.first * shape.second);
    }
    x_.assign(static_cast<size_t>(tokens * in), 0.5F);
    y_.assign(static_cast<size_t>(tokens * out), 0.25F);
    w_.assign(static_cast<size_t>(weight), 0.125F);
  }

  double Measure(const Context& ctx) {
    double seconds = 0;
    for (const auto& [shape, count] : shapes_) {
      const Tensor x(x_.data(), {tokens_, shape.second});
      const Tensor y(y_.data(), {tokens_, shape.first});
      const Tensor w(w_.data(), {shape.first, shape.second});
      const double start = ClockSeconds();
      for (int64_t i = 0; i < count; ++i) {
        kernels::GemmNT(ctx, x, w, y, {.alpha = kSmall});
        kernels::GemmNN(ctx, y, w, x, {.alpha = kSmall});
        kernels::GemmTN(ctx, y, x, w, {.alpha = kSmall});
      }
      seconds += ClockSeconds() - start;
    }
    return seconds;
  }

 private:
  static constexpr float kSmall = 1e-3F;  // keeps the numbers that go round in range
  MatrixShapes shapes_;
  int64_t tokens_;
  std::vector<float> x_, y_, w_;
};

// A model, its gradients and optimizer, and one document of random tokens.
class StepRunner {
 public:
  static StatusOr<std::unique_ptr<StepRunner>> Create(const model::ModelConfig& config,
                                                      const BenchOptions& options) {
    std::unique_ptr<StepRunner> runner(new StepRunner(config, options));
    SALA_ASSIGN_OR_RETURN(runner->mesh_,
                          parallel::Mesh::Create(*runner->world_, parallel::MeshConfig()));
    model::InitialiseParameters(config, /*seed=*/1, runner->params_);
    runner->reducer_ = std::make_unique<recipes::GradientReducer>(
        runner->ctx_, runner->params_, *runner->mesh_, /*rank_independent=*/false);
    runner->gradient_views_ = model::BindTensors(config, runner->reducer_->store());
    runner->optimizer_ = std::make_unique<recipes::Optimizer>(
        runner->ctx_, recipes::OptimizerConfig(), config, runner->parameters_,
        [](const model::ParameterSpec&) { return true; }, *runner->mesh_, *runner->reducer_);
    return runner;
  }

  const Context& ctx() const { return ctx_; }
  int64_t parameters() const { return params_.parameters(); }
  size_t peak_bytes() const { return arena_.peak_bytes() + scratch_.peak_bytes(); }

  struct Times {
    double forward_backward = 0, optimizer = 0;
    double loss = 0;
  };
  StatusOr<Times> Step() {
    Times times;
    const double start = ClockSeconds();
    reducer_->BeginStep();
    const auto loss =
        model::CrossEntropyStep(ctx_, arena_, model_, batch_, run_,
                                1.0F / static_cast<float>(batch_.targets()), gradient_views_);
    const double middle = ClockSeconds();
    SALA_RETURN_IF_ERROR(
        optimizer_->Update(ctx_, /*learning_rate=*/1e-3, /*loss_finite=*/true).status());
    times.forward_backward = middle - start;
    times.optimizer = ClockSeconds() - middle;
    times.loss = loss.loss_sum / static_cast<double>(loss.targets);
    return times;
  }

  double Forward() {
    const double start = ClockSeconds();
    const ArenaScope scope(arena_);
    model_.Forward(ctx_, arena_, batch_, run_);
    return ClockSeconds() - start;
  }

 private:
  StepRunner(const model::ModelConfig& config, const BenchOptions& options)
      : pool_(options.threads),
        ctx_{.pool = &pool_, .scratch = &scratch_},
        world_(parallel::MakeSelfCommunicator()),
        params_(model::ParameterSpecs(config)),
        parameters_(ctx_, params_),
        model_(config, params_),
        run_{.sparse_attention = options.sparse, .recompute = options.recompute} {
    PhiloxStream rng("v1|1|bench||0|tokens|");
    std::vector<int32_t> tokens(static_cast<size_t>(options.seq_len));
    for (int32_t& token : tokens)
      token = static_cast<int32_t>(rng.Bounded(static_cast<uint64_t>(config.vocab_size)));
    batch_ = model::SingleDocument(tokens);
    batch_.labels.assign(tokens.begin() + 1, tokens.end());
    batch_.labels.push_back(-1);
  }

  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
  std::unique_ptr<parallel::Communicator> world_;
  std::unique_ptr<parallel::Mesh> mesh_;
  model::ParameterStore params_;
  model::ComputeParameters parameters_;
  model::Model model_;
  model::ModelTensors gradient_views_;
  model::RunOptions run_;
  model::Batch batch_;
  std::unique_ptr<recipes::GradientReducer> reducer_;
  std::unique_ptr<recipes::Optimizer> optimizer_;
};

void PrintHead(const model::ModelConfig& config, const BenchOptions& options, int64_t parameters,
               const std::string& command) {
  std::printf("hardware    %s\n", CpuDescription().c_str());
  std::printf("commit      %s (%s build)\n", Commit().c_str(), BuildType().c_str());
  std::printf("command     %s\n", command.c_str());
  const auto softmax = std::count(config.mixer_types.begin(), config.mixer_types.end(), "minicpm4");
  std::printf(
      "model       %s parameters: %ld layers (%ld softmax), hidden %ld, MLP %ld, %ld heads of %ld, "
      "vocabulary %ld\n",
      WithCommas(parameters).c_str(), static_cast<long>(config.num_hidden_layers),
      static_cast<long>(softmax), static_cast<long>(config.hidden_size),
      static_cast<long>(config.intermediate_size), static_cast<long>(config.num_attention_heads),
      static_cast<long>(config.head_dim), static_cast<long>(config.vocab_size));
  std::printf(
      "step        one document of %s tokens, %d thread%s, recompute %s, sparse attention %s\n",
      WithCommas(options.seq_len).c_str(), options.threads, options.threads == 1 ? "" : "s",
      options.recompute ? "on" : "off", options.sparse ? "on" : "off");
}

Status BenchStep(const BenchOptions& options, const std::string& command) {
  SALA_ASSIGN_OR_RETURN(const model::ModelConfig config, ReadModel(options.config));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<StepRunner> runner,
                        StepRunner::Create(config, options));
  PrintHead(config, options, runner->parameters(), command);
  const MatrixShapes shapes = WeightShapes(config);
  const FlopCount flops = CountFlops(config, shapes, options.seq_len);
  std::printf(
      "FLOPs       6 P T + 6 T^2 N D per softmax layer + 12 T N D^2 per linear layer, P = %s "
      "elements of the matrices\n",
      WithCommas(MatrixParameters(shapes)).c_str());
  std::printf("            = %.3f G matrices + %.3f G softmax + %.3f G linear = %.3f G per step\n",
              flops.matrices * 1e-9, flops.softmax * 1e-9, flops.linear * 1e-9,
              flops.total() * 1e-9);

  GemmYardstick yardstick(shapes, options.seq_len);
  static_cast<void>(yardstick.Measure(
      runner->ctx()));  // the first round of each finds cold caches and new memory
  SALA_RETURN_IF_ERROR(runner->Step().status());
  std::vector<double> gemm, forward, both, optimizer, step, ratios;
  double loss = 0;
  for (int64_t i = 0; i < options.steps; ++i) {
    // In turn, so that a change of the machine's clock meets both.
    gemm.push_back(yardstick.Measure(runner->ctx()));
    SALA_ASSIGN_OR_RETURN(const StepRunner::Times times, runner->Step());
    forward.push_back(runner->Forward());
    both.push_back(times.forward_backward);
    optimizer.push_back(times.optimizer);
    step.push_back(times.forward_backward + times.optimizer);
    ratios.push_back((flops.total() / step.back()) / (flops.matrices / gemm.back()));
    loss = times.loss;
  }
  const double seconds = Median(step);
  const double gemm_seconds = Median(gemm);
  std::printf("GEMM        %.2f GFLOP/s at the model's shapes (%.1f ms a step's worth)\n",
              flops.matrices / gemm_seconds * 1e-9, gemm_seconds * 1e3);
  std::printf(
      "step        %.1f ms median of %ld, %.1f to %.1f; %.0f tokens/s; %.2f GFLOP/s; last loss "
      "%.4f\n",
      seconds * 1e3, static_cast<long>(options.steps),
      *std::min_element(step.begin(), step.end()) * 1e3,
      *std::max_element(step.begin(), step.end()) * 1e3,
      static_cast<double>(options.seq_len) / seconds, flops.total() / seconds * 1e-9, loss);
  std::printf("  forward   %.1f ms without the head\n", Median(forward) * 1e3);
  std::printf("  backward  %.1f ms with the head, its loss and gradients\n",
              (Median(both) - Median(forward)) * 1e3);
  std::printf("  optimizer %.1f ms\n", Median(optimizer) * 1e3);
  std::printf(
      "  the step's matrix products alone would take %.1f ms, everything else takes %.1f ms\n",
      gemm_seconds * 1e3, (seconds - gemm_seconds) * 1e3);
  std::printf("memory      %s of activations and work space at the peak\n",
              ByteText(static_cast<int64_t>(runner->peak_bytes())).c_str());
  std::printf("ratio       %.3f of the GEMM rate (median of %ld, %.3f to %.3f)\n", Median(ratios),
              static_cast<long>(options.steps), *std::min_element(ratios.begin(), ratios.end()),
              *std::max_element(ratios.begin(), ratios.end()));
  return OkStatus();
}

std::string CommandText(int argc, char** argv) {
  std::string text = "sala";
  for (int i = 1; i < argc; ++i) text += std::string(" ") + argv[i];
  return text;
}

}  // namespace

void AddBenchCommands(CommandLine& line) {
  CLI::App* group = AddCommand(line.app, "bench", "measurements", "sala bench step --steps 5");
  group->require_subcommand(1);
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command =
      AddCommand(*group, "step", "a training step against the matrix products of the same model",
                 "sala bench step --seq-len 2048 --threads 1 --steps 5");
  command->add_option(
      "--config", options->config,
      "YAML with the keys of a stage's `model`; default: a hybrid of about 15M parameters");
  command->add_option("--seq-len", options->seq_len, "tokens of the document")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "compute threads")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--steps", options->steps, "measured steps, after one that is not")
      ->check(CLI::Range(int64_t{1}, int64_t{100000}))
      ->capture_default_str();
  command->add_flag("--recompute", options->recompute,
                    "keep layer inputs only and run each layer again backward");
  command->add_flag("--sparse", options->sparse,
                    "block-sparse attention where the document is long enough");
  line.OnUse(command,
             [options, &line] { return BenchStep(*options, CommandText(line.argc, line.argv)); });
  AddBenchHaloCommand(line, *group);
}

}  // namespace sala::launch
