// Tokens/s and GFLOP/s of the three mixers, forward and backward, one thread, at training shapes.
// GFLOP counts the products that the formulas need: causal halves for dense attention, selected
// keys for sparse, chunk products for lightning.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/lightning/lightning.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels {
namespace {

struct Buffers {
  Buffers(int64_t tokens, int64_t n, int64_t k, int64_t d)
      : t(tokens), heads(n), kv_heads(k), width(d), pool(1) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &dout, &out, &dq}) x->resize(static_cast<size_t>(t * n * d));
    for (auto* x : {&k_, &v_, &dk, &dv}) x->resize(static_cast<size_t>(t * k * d));
    lse.resize(static_cast<size_t>(t * n));
    for (auto* x : {&q, &dout, &k_, &v_}) {
      for (float& value : *x) value = normal(rng);
    }
  }
  Context ctx() { return {DeviceKind::kCpu, &pool, &arena}; }
  Tensor Q(std::vector<float>& x) const { return Tensor(x.data(), {t, heads, width}); }
  Tensor K(std::vector<float>& x) const { return Tensor(x.data(), {t, kv_heads, width}); }
  Tensor Lse() { return Tensor(lse.data(), {t, heads}); }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(width)); }

  int64_t t, heads, kv_heads, width;
  ThreadPool pool;
  Arena arena;
  std::vector<float> q, k_, v_, out, lse, dout, dq, dk, dv;
};

std::vector<DocumentRange> Split(int64_t tokens, int64_t length) {
  std::vector<DocumentRange> documents;
  for (int64_t t = 0; t < tokens; t += length) {
    documents.push_back({t, std::min(tokens, t + length)});
  }
  return documents;
}

void Report(benchmark::State& state, double tokens, double flop) {
  using benchmark::Counter;
  state.counters["tokens/s"] = Counter(tokens, Counter::kIsIterationInvariantRate);
  state.counters["FLOP/s"] = Counter(flop, Counter::kIsIterationInvariantRate);
}

// Arguments of the dense cases: head width, document length. T = 2048, N = 8, K = 2.
struct DenseCase : Buffers {
  explicit DenseCase(const benchmark::State& state)
      : Buffers(2048, 8, 2, state.range(0)), documents(Split(t, state.range(1))) {
    for (const DocumentRange& document : documents) {
      const auto length = static_cast<double>(document.length());
      product += 2.0 * static_cast<double>(heads * width) * length * (length + 1) / 2;
    }
  }
  void Forward() { AttentionForward(ctx(), Q(q), K(k_), K(v_), documents, scale(), Q(out), Lse()); }
  std::vector<DocumentRange> documents;
  double product = 0;  // floating-point operations of one of the products
};

void BM_DenseForward(benchmark::State& state) {
  DenseCase c(state);
  for (auto _ : state) c.Forward();
  Report(state, static_cast<double>(c.t), 2 * c.product);
}

void BM_DenseBackward(benchmark::State& state) {
  DenseCase c(state);
  c.Forward();
  for (auto _ : state) {
    AttentionBackward(c.ctx(), c.Q(c.q), c.K(c.k_), c.K(c.v_), c.Q(c.out), c.Lse(), c.Q(c.dout),
                      c.documents, c.scale(), c.Q(c.dq), c.K(c.dk), c.K(c.dv));
  }
  Report(state, static_cast<double>(c.t), 5 * c.product);
}

// Arguments of the sparse cases: head width, query heads (one key/value head). T = 8192, 12 of 128
// blocks.
struct SparseCase : Buffers {
  explicit SparseCase(const benchmark::State& state)
      : Buffers(8192, state.range(1), 1, state.range(0)), documents(Split(t, t)) {
    config.window_size = 256;
    config.topk = 8;
    config.dense_len = 0;
    chosen.resize(static_cast<size_t>(t * config.free_blocks()));
    for (int64_t p = 0; p < t; ++p) {
      const int64_t keys = std::min(
          p + 1, (config.total_blocks() - 1) * config.block_size + p % config.block_size + 1);
      product += 2.0 * static_cast<double>(heads * width * keys);
      scoring +=
          2.0 * static_cast<double>(heads * width) * static_cast<double>(p) * (1.0 / 16 + 1.0 / 64);
    }
  }
  void Select() { SelectBlocks(ctx(), Q(q), K(k_), documents, config, scale(), Blocks()); }
  void Forward() {
    SparseAttentionForward(ctx(), Q(q), K(k_), K(v_), documents, config, scale(), Blocks(), Q(out),
                           Lse());
  }
  Tensor Blocks() { return Tensor(chosen.data(), {t, 1, config.free_blocks()}); }
  SparseAttentionConfig config;
  std::vector<DocumentRange> documents;
  std::vector<int32_t> chosen;
  double product = 0;
  double scoring = 0;
};

void BM_SparseSelect(benchmark::State& state) {
  SparseCase c(state);
  for (auto _ : state) c.Select();
  Report(state, static_cast<double>(c.t), c.scoring);
}

void BM_SparseForward(benchmark::State& state) {
  SparseCase c(state);
  c.Select();
  for (auto _ : state) c.Forward();
  Report(state, static_cast<double>(c.t), 2 * c.product);
}

void BM_SparseBackward(benchmark::State& state) {
  SparseCase c(state);
  c.Select();
  c.Forward();
  for (auto _ : state) {
    SparseAttentionBackward(c.ctx(), c.Q(c.q), c.K(c.k_), c.K(c.v_), c.Q(c.out), c.Lse(),
                            c.Q(c.dout), c.documents, c.config, c.scale(), c.Blocks(), c.Q(c.dq),
                            c.K(c.dk), c.K(c.dv));
  }
  Report(state, static_cast<double>(c.t), 5 * c.product);
}

// Arguments of the lightning cases: head width, document length. T = 2048, N = 8.
struct LightningCase : Buffers {
  explicit LightningCase(const benchmark::State& state)
      : Buffers(2048, 8, 8, state.range(0)), slopes(LightningSlopes(8)) {
    for (const DocumentRange& document : Split(t, state.range(1))) {
      cu_seqlens.push_back(static_cast<int32_t>(document.end));
    }
    const auto elements = static_cast<double>(t * heads * width);
    intra = 2.0 * elements * 64 / 2;
    inter = 2.0 * elements * static_cast<double>(width);
  }
  std::vector<float> slopes;
  std::vector<int32_t> cu_seqlens = {0};
  double intra = 0;  // one product inside the chunks
  double inter = 0;  // one product with the states
};

void BM_LightningForward(benchmark::State& state) {
  LightningCase c(state);
  for (auto _ : state) {
    LightningForward(c.ctx(), c.Q(c.q), c.Q(c.k_), c.Q(c.v_), c.cu_seqlens, c.slopes, c.scale(), {},
                     c.Q(c.out), {});
  }
  Report(state, static_cast<double>(c.t), 2 * c.intra + 2 * c.inter);
}

void BM_LightningBackward(benchmark::State& state) {
  LightningCase c(state);
  for (auto _ : state) {
    LightningBackward(c.ctx(), c.Q(c.q), c.Q(c.k_), c.Q(c.v_), c.Q(c.dout), c.cu_seqlens, c.slopes,
                      c.scale(), {}, {}, c.Q(c.dq), c.Q(c.dk), c.Q(c.dv), {});
  }
  Report(state, static_cast<double>(c.t), 5 * c.intra + 5 * c.inter);
}

void TrainingShapes(benchmark::internal::Benchmark* b) {
  for (int64_t width : {16, 32, 64, 128}) {
    for (int64_t length : {100, 2048}) b->Args({width, length});
  }
  b->Unit(benchmark::kMillisecond);
}

void SparseShapes(benchmark::internal::Benchmark* b) {
  for (int64_t width : {16, 64, 128}) {
    for (int64_t heads : {4, 16}) b->Args({width, heads});
  }
  b->Unit(benchmark::kMillisecond);
}

BENCHMARK(BM_DenseForward)->Apply(TrainingShapes);
BENCHMARK(BM_DenseBackward)->Apply(TrainingShapes);
BENCHMARK(BM_SparseSelect)->Apply(SparseShapes);
BENCHMARK(BM_SparseForward)->Apply(SparseShapes);
BENCHMARK(BM_SparseBackward)->Apply(SparseShapes);
BENCHMARK(BM_LightningForward)->Apply(TrainingShapes);
BENCHMARK(BM_LightningBackward)->Apply(TrainingShapes);

}  // namespace
}  // namespace sala::kernels

BENCHMARK_MAIN();
