// sala bench step: one training step on the CPU against the matrix products of the same model, ours
// and those of other libraries, all measured in turn.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "core/clock.h"
#include "core/file.h"
#include "core/json.h"
#include "core/rng.h"
#include "kernels/gemm/gemm.h"
#include "launch/bench.h"
#include "launch/blas_peers.h"
#include "launch/command.h"
#include "model/loss.h"
#include "model/model.h"
#include "model/work.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "recipes/optimizer.h"

namespace sala::launch {
namespace {

// "model.layers.3.self_attn.q_proj.weight" -> "model.layers.3.self_attn.in": maps of one input are
// one product (model/projection.h).
std::string ProductOf(const std::string& name) {
  const auto ends = [&name](const char* end) {
    const std::string suffix = std::string(end) + ".weight";
    return name.size() >= suffix.size() &&
           name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0;
  };
  if (ends("o_proj") || ends("down_proj")) return name;
  const size_t last = name.rfind('.', name.size() - std::string(".weight").size() - 1);
  return name.substr(0, last) + ".in";
}

// All matrix products of a step at the model's own shapes: for each weight [out, in] forward, input
// and weight gradient.
class GemmYardstick {
 public:
  GemmYardstick(const model::ModelConfig& config, int64_t tokens) : tokens_(tokens) {
    std::map<std::string, std::pair<int64_t, int64_t>> products;
    for (const model::ParameterSpec& spec : model::ParameterSpecs(config)) {
      if (spec.kind != model::ParameterKind::kMatrix) continue;
      auto& [out, in] = products[ProductOf(spec.name)];
      out += spec.shape[0];
      in = spec.shape[1];
    }
    for (const auto& [name, shape] : products) ++shapes_[shape];
    // The output head; the embedding is a look-up, no product.
    ++shapes_[{config.vocab_size, config.hidden_size}];
    int64_t in = 0;
    int64_t out = 0;
    int64_t weight = 0;
    for (const auto& [shape, count] : shapes_) {
      out = std::max(out, shape.first);
      in = std::max(in, shape.second);
      weight = std::max(weight, shape.first * shape.second);
      elements_ += shape.first * shape.second * count;
    }
    x_ = Operand("x", tokens * in);
    y_ = Operand("y", tokens * out);
    w_ = Operand("w", weight);
    result_.resize(std::max({x_.size(), y_.size(), w_.size()}));
  }

  double flops() const {
    return 6.0 * static_cast<double>(elements_) * static_cast<double>(tokens_);
  }

  // Seconds of our own.
  double Measure(const Context& ctx) {
    return Run([&](ProductForm form, int64_t out, int64_t in) {
      const ConstTensor x(x_.data(), {tokens_, in});
      const ConstTensor y(y_.data(), {tokens_, out});
      const ConstTensor w(w_.data(), {out, in});
      switch (form) {
        case ProductForm::kNT:
          return kernels::GemmNT(ctx, x, w, Tensor(result_.data(), {tokens_, out}));
        case ProductForm::kNN:
          return kernels::GemmNN(ctx, y, w, Tensor(result_.data(), {tokens_, in}));
        case ProductForm::kTN:
          return kernels::GemmTN(ctx, y, x, Tensor(result_.data(), {out, in}));
      }
    });
  }

  double Measure(const BlasPeer& peer) {
    return Run([&](ProductForm form, int64_t out, int64_t in) {
      const auto multiply = [&](int64_t m, int64_t n, int64_t k, const float* a, const float* b) {
        SALA_CHECK(peer.Multiply(form, m, n, k, 1.0F, a, b, result_.data())) << peer.name();
      };
      switch (form) {
        case ProductForm::kNT:
          return multiply(tokens_, out, in, x_.data(), w_.data());
        case ProductForm::kNN:
          return multiply(tokens_, in, out, y_.data(), w_.data());
        case ProductForm::kTN:
          return multiply(out, in, tokens_, y_.data(), x_.data());
      }
    });
  }

 private:
  // Of ordinary numbers: a processor may take less time, or more, for zeros and denormal ones.
  static std::vector<float> Operand(const char* what, int64_t n) {
    PhiloxStream rng("v1|1|bench||0|gemm|" + std::string(what));
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = static_cast<float>(rng.NextDouble() - 0.5);
    return values;
  }

  template <typename Multiply>
  double Run(const Multiply& multiply) {
    const double start = ClockSeconds();
    for (const auto& [shape, count] : shapes_) {
      for (int64_t i = 0; i < count; ++i) {
        for (const ProductForm form : {ProductForm::kNT, ProductForm::kNN, ProductForm::kTN}) {
          multiply(form, shape.first, shape.second);
        }
      }
    }
    return ClockSeconds() - start;
  }

  std::map<std::pair<int64_t, int64_t>, int64_t> shapes_;  // and how often the model has it
  int64_t tokens_;
  int64_t elements_ = 0;
  std::vector<float> x_, y_, w_, result_;
};

// A model, its gradients and optimizer, and one document of random tokens.
class StepRunner {
 public:
  static StatusOr<std::unique_ptr<StepRunner>> Create(const model::ModelConfig& config,
                                                      const StepBenchOptions& options) {
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
  StepRunner(const model::ModelConfig& config, const StepBenchOptions& options)
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

// What the rounds of a run gave, in seconds.
struct Rounds {
  std::vector<double> gemm, forward, both, optimizer, step;
  std::vector<double> step_over_gemm;      // rates
  std::vector<std::vector<double>> peers;  // of each library
  std::vector<double> gemm_over_best;      // rates
  double loss = 0;
};

StatusOr<Rounds> MeasureRounds(StepRunner& runner, GemmYardstick& yardstick,
                               const std::vector<BlasPeer>& peers, double step_flops,
                               int64_t count) {
  // The first round of each finds cold caches and new memory.
  static_cast<void>(yardstick.Measure(runner.ctx()));
  for (const BlasPeer& peer : peers) static_cast<void>(yardstick.Measure(peer));
  SALA_RETURN_IF_ERROR(runner.Step().status());
  Rounds rounds;
  rounds.peers.resize(peers.size());
  for (int64_t i = 0; i < count; ++i) {
    // In turn, so that a change of the machine's clock meets all.
    rounds.gemm.push_back(yardstick.Measure(runner.ctx()));
    double best = 0;
    for (size_t p = 0; p < peers.size(); ++p) {
      const double seconds = yardstick.Measure(peers[p]);
      rounds.peers[p].push_back(seconds);
      if (p == 0 || seconds < best) best = seconds;
    }
    if (!peers.empty()) rounds.gemm_over_best.push_back(best / rounds.gemm.back());
    SALA_ASSIGN_OR_RETURN(const StepRunner::Times times, runner.Step());
    rounds.forward.push_back(runner.Forward());
    rounds.both.push_back(times.forward_backward);
    rounds.optimizer.push_back(times.optimizer);
    rounds.step.push_back(times.forward_backward + times.optimizer);
    rounds.step_over_gemm.push_back((step_flops / rounds.step.back()) /
                                    (yardstick.flops() / rounds.gemm.back()));
    rounds.loss = times.loss;
  }
  return rounds;
}

void PrintRatio(const char* name, const char* meaning, const std::vector<double>& values) {
  const Measured m = MeasuredOf(values);
  std::printf("%s %.3f %s (median of %zu, %.3f to %.3f)\n", name, m.median, meaning, values.size(),
              m.least, m.most);
}

void PrintWork(const model::ForwardWork& work) {
  std::printf(
      "FLOPs       %.3f G matrices + %.3f G softmax attention + %.3f G selection + %.3f G "
      "Lightning "
      "= %.3f G per step\n",
      3e-9 * work.products, 3e-9 * work.attention, 1e-9 * work.selection, 3e-9 * work.lightning,
      1e-9 * work.step());
}

void PrintRounds(const StepBenchOptions& options, const Rounds& rounds, const BlasPeers& peers,
                 double gemm_flops, double step_flops) {
  const Measured gemm = MeasuredOf(rounds.gemm);
  const Measured step = MeasuredOf(rounds.step);
  const double forward = MeasuredOf(rounds.forward).median;
  std::printf("GEMM        %.2f GFLOP/s at the model's shapes (%.1f ms a step's worth)\n",
              gemm_flops / gemm.median * 1e-9, gemm.median * 1e3);
  for (size_t p = 0; p < peers.found.size(); ++p) {
    const Measured peer = MeasuredOf(rounds.peers[p]);
    std::printf("  %s: %.2f GFLOP/s (%.1f ms)\n", peers.found[p].name().c_str(),
                gemm_flops / peer.median * 1e-9, peer.median * 1e3);
  }
  for (const std::string& text : peers.missing) std::printf("  not measured: %s\n", text.c_str());
  std::printf(
      "step        %.1f ms median of %zu, %.1f to %.1f; %.0f tokens/s; %.2f GFLOP/s; last loss "
      "%.4f\n",
      step.median * 1e3, rounds.step.size(), step.least * 1e3, step.most * 1e3,
      static_cast<double>(options.seq_len) / step.median, step_flops / step.median * 1e-9,
      rounds.loss);
  std::printf("  forward   %.1f ms without the head\n", forward * 1e3);
  std::printf("  backward  %.1f ms with the head, its loss and gradients\n",
              (MeasuredOf(rounds.both).median - forward) * 1e3);
  std::printf("  optimizer %.1f ms\n", MeasuredOf(rounds.optimizer).median * 1e3);
  std::printf(
      "  the step's matrix products alone would take %.1f ms, everything else takes %.1f ms\n",
      gemm.median * 1e3, (step.median - gemm.median) * 1e3);
}

Status WriteJson(const StepBenchOptions& options, const std::string& command, const Rounds& rounds,
                 const BlasPeers& peers, double gemm_flops, double step_flops, int64_t parameters) {
  nlohmann::ordered_json json = OriginJson(command);
  json["parameters"] = parameters;
  json["seq_len"] = options.seq_len;
  json["threads"] = options.threads;
  json["step_flops"] = step_flops;
  json["gemm_flops"] = gemm_flops;
  json["step_seconds"] = rounds.step;
  json["forward_seconds"] = rounds.forward;
  json["optimizer_seconds"] = rounds.optimizer;
  json["gemm_seconds"] = rounds.gemm;
  json["step_over_gemm"] = rounds.step_over_gemm;
  json["gemm_over_best_library"] = rounds.gemm_over_best;
  auto libraries = nlohmann::ordered_json::object();
  for (size_t p = 0; p < peers.found.size(); ++p) {
    libraries[peers.found[p].name()] = rounds.peers[p];
  }
  json["library_gemm_seconds"] = std::move(libraries);
  return WriteFileAtomically(options.json, DumpJson(json, 2) + "\n");
}

}  // namespace

Status BenchStep(const StepBenchOptions& options, const std::string& command) {
  SALA_ASSIGN_OR_RETURN(const model::ModelConfig config, ReadBenchModel(options.config));
  SALA_RETURN_IF_ERROR(TryReport(options.json));
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<StepRunner> runner,
                        StepRunner::Create(config, options));
  PrintBenchHead(config, command);
  std::printf("parameters  %s\n", WithCommas(runner->parameters()).c_str());
  std::printf(
      "step        one document of %s tokens, %d thread%s, recompute %s, sparse attention %s\n",
      WithCommas(options.seq_len).c_str(), options.threads, options.threads == 1 ? "" : "s",
      options.recompute ? "on" : "off", options.sparse ? "on" : "off");
  const model::ForwardWork work = model::ForwardWorkOf(config, options.sparse, options.seq_len);
  PrintWork(work);
  const BlasPeers peers = options.peers ? LoadBlasPeers(options.threads) : BlasPeers{};
  GemmYardstick yardstick(config, options.seq_len);
  SALA_ASSIGN_OR_RETURN(const Rounds rounds,
                        MeasureRounds(*runner, yardstick, peers.found, work.step(), options.steps));
  PrintRounds(options, rounds, peers, yardstick.flops(), work.step());
  std::printf("memory      %s of activations and work space at the peak\n",
              ByteText(static_cast<int64_t>(runner->peak_bytes())).c_str());
  PrintRatio("ratio      ", "of the GEMM rate: the whole step", rounds.step_over_gemm);
  if (!rounds.gemm_over_best.empty()) {
    PrintRatio("           ", "of the best library's GEMM rate: our matrix products",
               rounds.gemm_over_best);
  }
  if (options.json.empty()) return OkStatus();
  return WriteJson(options, command, rounds, peers, yardstick.flops(), work.step(),
                   runner->parameters());
}

}  // namespace sala::launch
