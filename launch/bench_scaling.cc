// sala bench scaling: what a token costs in sparse, dense and Lightning attention, forward and
// backward, as the document grows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "core/clock.h"
#include "core/file.h"
#include "core/json.h"
#include "core/rng.h"
#include "kernels/attention/attention.h"
#include "kernels/lightning/lightning.h"
#include "kernels/sparse_attention/sparse_attention.h"
#include "launch/bench.h"
#include "launch/command.h"

namespace sala::launch {
namespace {

constexpr double kLongSeconds = 10;  // a measurement beyond this is not repeated

// What is measured, in the order of the table.
enum Kind : size_t { kSparseShared, kSparseOwn, kDense, kLightning, kKinds };
constexpr const char* kNames[kKinds] = {"sparse, shared blocks", "sparse, own blocks", "dense",
                                        "Lightning"};
constexpr const char* kKeys[kKinds] = {"sparse_shared", "sparse_own", "dense", "lightning"};

// Seconds for a whole document; `selection` is part of `forward`.
struct Seconds {
  std::vector<double> selection, forward, backward;
  double total() const { return MeasuredOf(forward).median + MeasuredOf(backward).median; }
};

// Operands of one layer over one document, and room for everything it gives.
class Layer {
 public:
  // Queries of `shared` neighbours point the same way but for a little noise, so that they choose
  // the same blocks; 1: each token for itself.
  Layer(Arena& arena, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t shared)
      : scale(1.0F / std::sqrt(static_cast<float>(dim))), documents({{0, tokens}}) {
    const auto normal = [&](const char* what, int64_t n) {
      const Tensor x = arena.New(DType::kF32, {tokens, n, dim});
      PhiloxStream rng("v1|1|bench||0|scaling|" + std::string(what));
      for (int64_t i = 0; i < tokens * n * dim; ++i) {
        x.Data<float>()[i] = static_cast<float>(rng.NextNormal());
      }
      return x;
    };
    q = normal("q", heads);
    k = normal("k", kv_heads);
    v = normal("v", kv_heads);
    dout = normal("dout", heads);
    for (int64_t t = 0; t < tokens && shared > 1; ++t) {
      const float* first = q.Row<float>(t / shared * shared);
      for (int64_t i = 0; t % shared != 0 && i < heads * dim; ++i) {
        q.Row<float>(t)[i] = first[i] + kNoise * q.Row<float>(t)[i];
      }
    }
    out = arena.New(DType::kF32, {tokens, heads, dim});
    lse = arena.New(DType::kF32, {tokens, heads});
    dq = arena.New(DType::kF32, {tokens, heads, dim});
    dk = arena.New(DType::kF32, {tokens, kv_heads, dim});
    dv = arena.New(DType::kF32, {tokens, kv_heads, dim});
  }

  Tensor q{}, k{}, v{}, dout{}, out{}, lse{}, dq{}, dk{}, dv{}, blocks{};
  float scale;
  std::vector<kernels::DocumentRange> documents;

 private:
  static constexpr float kNoise = 0.05F;
};

double Timed(const std::function<void()>& run) {
  const double start = ClockSeconds();
  run();
  return ClockSeconds() - start;
}

class ScalingBench {
 public:
  ScalingBench(const model::ModelConfig& config, const ScalingBenchOptions& options)
      : config_(config),
        options_(options),
        pool_(options.threads),
        ctx_{.pool = &pool_, .scratch = &scratch_} {}

  // Empty vectors where `kind` is not measured at this length.
  Seconds Measure(Kind kind, int64_t tokens) {
    if (kind == kDense && tokens > options_.longest_dense) return {};
    if ((kind == kSparseShared || kind == kSparseOwn) && config_.sparse.free_blocks() < 0)
      return {};
    const ArenaScope scope(arena_);
    const bool linear = kind == kLightning;
    Layer layer(arena_, tokens, linear ? config_.lightning_nh : config_.num_attention_heads,
                linear ? config_.lightning_nh : config_.num_key_value_heads,
                linear ? config_.lightning_head_dim : config_.head_dim,
                kind == kSparseShared ? config_.sparse.block_size : 1);
    switch (kind) {
      case kSparseShared:
      case kSparseOwn:
        return Sparse(layer);
      case kDense:
        return Repeat(
            {}, [&] { Dense(layer); }, [&] { DenseBackward(layer); });
      default:
        return Lightning(layer);
    }
  }

 private:
  void Dense(const Layer& x) {
    kernels::AttentionForward(ctx_, x.q, x.k, x.v, x.documents, x.scale, x.out, x.lse);
  }
  void DenseBackward(const Layer& x) {
    kernels::AttentionBackward(ctx_, x.q, x.k, x.v, x.out, x.lse, x.dout, x.documents, x.scale,
                               x.dq, x.dk, x.dv);
  }

  Seconds Sparse(Layer& x) {
    x.blocks = arena_.New(
        DType::kI32, {x.q.dim(0), x.k.dim(1), std::max<int64_t>(1, config_.sparse.free_blocks())});
    return Repeat(
        [&] {
          kernels::SelectBlocks(ctx_, x.q, x.k, x.documents, config_.sparse, x.scale, x.blocks);
        },
        [&] {
          kernels::SparseAttentionForward(ctx_, x.q, x.k, x.v, x.documents, config_.sparse, x.scale,
                                          x.blocks, x.out, x.lse);
        },
        [&] {
          kernels::SparseAttentionBackward(ctx_, x.q, x.k, x.v, x.out, x.lse, x.dout, x.documents,
                                           config_.sparse, x.scale, x.blocks, x.dq, x.dk, x.dv);
        });
  }

  Seconds Lightning(const Layer& x) {
    const std::vector<int32_t> borders = {0, static_cast<int32_t>(x.q.dim(0))};
    const std::vector<float> slopes = kernels::LightningSlopes(x.q.dim(1));
    return Repeat(
        {},
        [&] {
          kernels::LightningForward(ctx_, x.q, x.k, x.v, borders, slopes, x.scale, {}, x.out, {});
        },
        [&] {
          kernels::LightningBackward(ctx_, x.q, x.k, x.v, x.dout, borders, slopes, x.scale, {}, {},
                                     x.dq, x.dk, x.dv, {});
        });
  }

  // One round that is not counted, unless it is a long one; then --rounds of them.
  Seconds Repeat(const std::function<void()>& selection, const std::function<void()>& forward,
                 const std::function<void()>& backward) {
    Seconds seconds;
    for (int64_t round = 0; round <= options_.rounds; ++round) {
      const double select = selection ? Timed(selection) : 0;
      const double ahead = select + Timed(forward);
      const double back = Timed(backward);
      const bool is_long = ahead + back > kLongSeconds;
      if (round == 0 && !is_long) continue;
      seconds.selection.push_back(select);
      seconds.forward.push_back(ahead);
      seconds.backward.push_back(back);
      if (is_long) break;
    }
    return seconds;
  }

  const model::ModelConfig& config_;
  const ScalingBenchOptions& options_;
  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
};

// [kind][length]
using Results = std::vector<std::vector<Seconds>>;

double PerToken(double seconds, int64_t tokens) {
  return seconds * 1e6 / static_cast<double>(tokens);
}

void PrintTable(const ScalingBenchOptions& options, const Results& results) {
  std::printf(
      "\nmicroseconds per token of one layer, forward and backward (selection of blocks)\n\n");
  std::printf("%10s", "tokens");
  for (const char* name : kNames) std::printf(" %24s", name);
  std::printf("\n");
  for (size_t i = 0; i < options.lengths.size(); ++i) {
    std::printf("%10s", WithCommas(options.lengths[i]).c_str());
    for (size_t kind = 0; kind < kKinds; ++kind) {
      const Seconds& s = results[kind][i];
      std::string text = "-";
      if (!s.forward.empty()) {
        text = Format("%.2f", PerToken(s.total(), options.lengths[i]));
        const double select = MeasuredOf(s.selection).median;
        if (select > 0) text += Format(" (%.2f)", PerToken(select, options.lengths[i]));
      }
      std::printf(" %24s", text.c_str());
    }
    std::printf("\n");
  }
}

// The cost of a token that is added to a document of length i - 1 to make it length i, in
// microseconds. The average over a document still rises long after a new token's cost does not:
// its first tokens see less than a window.
std::vector<double> AddedTokens(const ScalingBenchOptions& options,
                                const std::vector<Seconds>& seconds, int64_t window) {
  std::vector<double> added;
  for (size_t i = 1; i < seconds.size(); ++i) {
    if (options.lengths[i - 1] < window || seconds[i].forward.empty()) continue;
    added.push_back(PerToken(seconds[i].total() - seconds[i - 1].total(),
                             options.lengths[i] - options.lengths[i - 1]));
  }
  return added;
}

void PrintFlatness(const char* name, int64_t window, const std::vector<double>& added) {
  if (added.size() < 2) {
    std::printf("  %-22s not measured: it needs three lengths from %s tokens on\n", name,
                WithCommas(window).c_str());
    return;
  }
  const Measured m = MeasuredOf(added);
  std::printf("  %-22s from %s tokens on: %.2f to %.2f, the most is %.3f of the least\n", name,
              WithCommas(window).c_str(), m.least, m.most, m.most / m.least);
}

Status WriteJson(const ScalingBenchOptions& options, const std::string& command,
                 const Results& results) {
  nlohmann::ordered_json json = OriginJson(command);
  json["threads"] = options.threads;
  json["lengths"] = options.lengths;
  for (size_t kind = 0; kind < kKinds; ++kind) {
    auto points = nlohmann::ordered_json::array();
    for (const Seconds& s : results[kind]) {
      points.push_back({{"selection_seconds", s.selection},
                        {"forward_seconds", s.forward},
                        {"backward_seconds", s.backward}});
    }
    json[kKeys[kind]] = std::move(points);
  }
  return WriteFileAtomically(options.json, DumpJson(json, 2) + "\n");
}

}  // namespace

Status BenchScaling(const ScalingBenchOptions& options, const std::string& command) {
  const auto fall =
      std::is_sorted_until(options.lengths.begin(), options.lengths.end(), std::less_equal<>());
  if (fall != options.lengths.end()) {
    return MakeError(
        ExitCode::kUsage, "USAGE",
        Format("--lengths: found %ld after %ld; expected each to be larger than the one "
               "before; sort them",
               static_cast<long>(*fall), static_cast<long>(*(fall - 1))));
  }
  SALA_ASSIGN_OR_RETURN(const model::ModelConfig config, ReadBenchModel(options.config));
  SALA_RETURN_IF_ERROR(TryReport(options.json));
  PrintBenchHead(config, command);
  std::printf("threads     %d\n", options.threads);
  std::fflush(stdout);
  ScalingBench bench(config, options);
  Results results(kKinds);
  for (const int64_t tokens : options.lengths) {
    for (size_t kind = 0; kind < kKinds; ++kind) {
      results[kind].push_back(bench.Measure(static_cast<Kind>(kind), tokens));
    }
  }
  PrintTable(options, results);
  const int64_t budget = config.sparse.total_blocks() * config.sparse.block_size;
  std::printf("\nmicroseconds for each token that is added\n");
  PrintFlatness(kNames[kSparseShared], budget,
                AddedTokens(options, results[kSparseShared], budget));
  PrintFlatness(kNames[kSparseOwn], budget, AddedTokens(options, results[kSparseOwn], budget));
  PrintFlatness(kNames[kLightning], 1, AddedTokens(options, results[kLightning], 1));
  if (options.json.empty()) return OkStatus();
  return WriteJson(options, command, results);
}

}  // namespace sala::launch
