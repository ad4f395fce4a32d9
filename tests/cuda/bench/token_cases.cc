#include <algorithm>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "kernels/cuda_kernels.h"
#include "tests/cuda/bench/cases.h"
#include "tests/cuda/bench/shapes.h"

namespace sala::bench {
namespace {

using kernels::Write;

std::string Shape(std::initializer_list<int64_t> dims) {
  std::string text = "[";
  for (int64_t n : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

std::vector<int64_t> TokenCounts(bool smoke) {
  if (smoke) return {40};
  return {4096, 32768, 131072};
}

// One set of tensors for each call of a case, made by `make`.
template <typename Set, typename Make>
std::vector<Set> MakeSets(int sets, const Make& make) {
  std::vector<Set> all;
  for (int i = 0; i < sets; ++i) all.push_back(make());
  return all;
}

struct Tensors {
  Tensor a{}, b{}, c{};
};

// A case over bf16 tensors [tokens, width]: `reads` of them random, `writes` as outputs.
class RowCases {
 public:
  RowCases(Bench& bench, int64_t tokens) : bench_(bench), tokens_(tokens) {}

  // bytes: useful traffic per element of [tokens, width]. `run` gets the tensors of a set, reads
  // first.
  void Run(const std::string& name, int64_t width, int reads, int writes, double bytes,
           const std::function<void(const Context&, const std::vector<Tensor>&)>& run,
           double more_bytes = 0, const std::string& note = "") {
    const double elements = static_cast<double>(tokens_) * static_cast<double>(width);
    Case what;
    what.section = "rows";
    what.name = name;
    what.shape = Shape({tokens_, width});
    what.tokens = tokens_;
    what.bytes = bytes * elements + more_bytes;
    what.set_bytes = 2 * elements * (reads + writes);
    what.note = note;
    bench_.Run(what, [&](Arena& arena, int sets) {
      auto all = MakeSets<std::vector<Tensor>>(sets, [&] {
        std::vector<Tensor> tensors;
        for (int i = 0; i < reads + writes; ++i)
          tensors.push_back(bench_.Random(arena, DType::kBF16, {tokens_, width}));
        return tensors;
      });
      return [this, all, run](int set) { run(bench_.ctx(), all[static_cast<size_t>(set)]); };
    });
  }

 private:
  Bench& bench_;
  int64_t tokens_;
};

void NormCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  RowCases rows(bench, tokens);
  const int64_t h = model.hidden_size;
  constexpr float kEps = 1e-6F;
  Arena arena(size_t{1} << 20, &bench.device());
  const Tensor weight = bench.Ones(arena, DType::kBF16, h);
  const Tensor rstd = bench.Ones(arena, DType::kF32, tokens);
  const Tensor dweight = bench.Random(arena, DType::kF32, {h});
  const double statistics = 4.0 * static_cast<double>(tokens);
  rows.Run(
      "rms_norm_forward", h, 1, 1, 4,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::RmsNormForward(ctx, x[0], weight, kEps, x[1], rstd);
      },
      statistics);
  rows.Run(
      "rms_norm_residual_forward", h, 2, 2, 8,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::RmsNormResidualForward(ctx, x[0], x[1], 0.25F, weight, kEps, x[2], x[3], rstd);
      },
      statistics, "residual + branch, then norm");
  rows.Run(
      "rms_norm_backward", h, 2, 1, 8,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::RmsNormBackward(ctx, x[0], x[1], weight, rstd, x[2], Write::kAccumulate, dweight);
      },
      statistics, "dx accumulates, weight gradient included");

  const int64_t w = model.lightning_width();
  const Tensor wide = bench.Ones(arena, DType::kBF16, w);
  const Tensor dwide = bench.Random(arena, DType::kF32, {w});
  rows.Run(
      "norm_gate_forward", w, 2, 1, 6,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::OutputGateForward(ctx, x[0], wide, x[1], kEps, x[2], rstd);
      },
      statistics, "Lightning layers");
  rows.Run(
      "norm_gate_backward", w, 3, 2, 10,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::OutputGateBackward(ctx, x[0], x[1], wide, x[2], rstd, x[3], x[4], dwide);
      },
      statistics, "weight gradient included");
  rows.Run("gate_forward", w, 2, 1, 6, [&](const Context& ctx, const std::vector<Tensor>& x) {
    kernels::OutputGateForward(ctx, x[0], {}, x[1], kEps, x[2], {});
  });
  rows.Run("gate_backward", w, 3, 2, 10, [&](const Context& ctx, const std::vector<Tensor>& x) {
    kernels::OutputGateBackward(ctx, x[0], x[1], {}, x[2], {}, x[3], x[4], {});
  });
}

void RopeCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  RowCases rows(bench, tokens);
  const int64_t n = model.lightning_nh;
  const int64_t d = model.lightning_head_dim;
  Arena arena(size_t{1} << 20, &bench.device());
  const Tensor weight = bench.Ones(arena, DType::kBF16, d);
  const Tensor dweight = bench.Random(arena, DType::kF32, {d});
  const Tensor cos = bench.Random(arena, DType::kF32, {tokens, d / 2});
  const Tensor sin = bench.Random(arena, DType::kF32, {tokens, d / 2});
  const Tensor rstd = bench.Random(arena, DType::kF32, {tokens, n});
  const double tables = 4.0 * static_cast<double>(tokens * d + tokens * n);
  rows.Run(
      "qk_norm_rope_forward", n * d, 1, 1, 4,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::QkNormRopeForward(ctx, x[0].AsHeads(n, d), weight, 1e-6F, cos, sin,
                                   x[1].AsHeads(n, d), rstd);
      },
      tables, "queries of a Lightning layer");
  rows.Run(
      "qk_norm_rope_backward", n * d, 2, 1, 6,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::QkNormRopeBackward(ctx, x[0].AsHeads(n, d), x[1].AsHeads(n, d), weight, rstd, cos,
                                    sin, x[2].AsHeads(n, d), dweight);
      },
      tables, "weight gradient included");
}

void MlpCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  RowCases rows(bench, tokens);
  const int64_t f = model.intermediate_size;
  rows.Run("swiglu_forward", f, 2, 1, 6, [](const Context& ctx, const std::vector<Tensor>& x) {
    kernels::SwiGluForward(ctx, x[0], x[1], x[2]);
  });
  rows.Run("swiglu_backward", f, 3, 2, 10, [](const Context& ctx, const std::vector<Tensor>& x) {
    kernels::SwiGluBackward(ctx, x[0], x[1], x[2], x[3], x[4]);
  });
  rows.Run("add", model.hidden_size, 2, 0, 6,
           [](const Context& ctx, const std::vector<Tensor>& x) { kernels::Add(ctx, x[0], x[1]); });
  rows.Run(
      "copy", model.hidden_size, 1, 1, 4,
      [](const Context& ctx, const std::vector<Tensor>& x) { kernels::Cast(ctx, x[0], x[1]); });
  rows.Run(
      "squared_error", model.hidden_size, 2, 1, 6,
      [](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::MeanSquaredError(ctx, x[0], x[1], 1.0F, x[2]);
      },
      0, "waits for its result");
}

void EmbeddingCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  RowCases rows(bench, tokens);
  const int64_t h = model.hidden_size;
  const int64_t v = model.vocab_size;
  Arena arena(size_t{1} << 20, &bench.device());
  const std::vector<int32_t> ids = Bench::RandomIds(tokens, v);
  const ConstTensor device_ids = bench.Integers(arena, ids);
  const auto distinct = static_cast<double>(std::set<int32_t>(ids.begin(), ids.end()).size());
  const Tensor table = bench.Random(arena, DType::kBF16, {v, h}, 0.02F);
  rows.Run("embedding_forward", h, 0, 1, 4, [&](const Context& ctx, const std::vector<Tensor>& x) {
    kernels::EmbeddingForward(ctx, device_ids, table, 12.0F, x[0]);
  });
  const Tensor dtable = bench.Random(arena, DType::kF32, {v, h}, 0.02F);
  rows.Run(
      "embedding_backward", h, 1, 0, 2,
      [&](const Context& ctx, const std::vector<Tensor>& x) {
        kernels::EmbeddingBackward(ctx, device_ids, x[0], 12.0F, dtable);
      },
      8 * distinct * static_cast<double>(h),
      "rows of distinct ids are read and written in float32");
}

// Tokens that the model takes at a time on a GPU (model/loss.cc).
constexpr int64_t kLossChunk = 2048;

// The losses, with the head's products.
void LossCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  const int64_t h = model.hidden_size;
  const int64_t v = model.vocab_size;
  const double product =
      2.0 * static_cast<double>(tokens) * static_cast<double>(h) * static_cast<double>(v);
  const double weights = static_cast<double>(h) * static_cast<double>(v);
  Case what;
  what.section = "losses";
  what.tokens = tokens;
  what.shape = Shape({tokens, h}) + " x " + Shape({v, h});
  for (const int64_t chunk : {kLossChunk, 2 * kLossChunk}) {
    if (chunk > kLossChunk && bench.smoke()) continue;
    what.name =
        "cross_entropy_step" + (chunk == kLossChunk ? "" : "_chunk" + std::to_string(chunk));
    what.flops = 3 * product;
    what.set_bytes =
        6 * weights + 4.0 * static_cast<double>(tokens * h) + 4.0 * static_cast<double>(chunk * v);
    what.note = "loss and both gradients, " + std::to_string(chunk) + " tokens at a time";
    bench.Run(what, [&](Arena& arena, int) {
      const Tensor hidden = bench.Random(arena, DType::kBF16, {tokens, h});
      const Tensor weight = bench.Random(arena, DType::kBF16, {v, h}, 0.02F);
      const Tensor dhidden = bench.New(arena, DType::kBF16, {tokens, h});
      const Tensor dweight = bench.Random(arena, DType::kF32, {v, h}, 0.02F);
      const ConstTensor labels = bench.Integers(arena, Bench::RandomIds(tokens, v));
      const float scale = 1.0F / static_cast<float>(tokens);
      return [=, &bench](int) {
        kernels::CrossEntropy(bench.ctx(), hidden, weight, labels,
                              {.logit_scale = 0.0625F, .grad_scale = scale, .chunk_tokens = chunk},
                              {}, dhidden, dweight);
      };
    });
  }
  what.name = "kl_divergence_step";
  what.flops = 4 * product;
  what.set_bytes = 8 * weights + 6.0 * static_cast<double>(tokens * h) +
                   8.0 * static_cast<double>(kLossChunk * v);
  what.note = "teacher's and student's logits, both gradients of the student, " +
              std::to_string(kLossChunk) + " tokens at a time";
  bench.Run(what, [&](Arena& arena, int) {
    const Tensor teacher = bench.Random(arena, DType::kBF16, {tokens, h});
    const Tensor hidden = bench.Random(arena, DType::kBF16, {tokens, h});
    const Tensor teacher_weight = bench.Random(arena, DType::kBF16, {v, h}, 0.02F);
    const Tensor weight = bench.Random(arena, DType::kBF16, {v, h}, 0.02F);
    const Tensor dhidden = bench.New(arena, DType::kBF16, {tokens, h});
    const Tensor dweight = bench.Random(arena, DType::kF32, {v, h}, 0.02F);
    return [=, &bench](int) {
      kernels::KlDivergence(bench.ctx(), teacher, teacher_weight, hidden, weight,
                            {.teacher_logit_scale = 0.0625F,
                             .student_logit_scale = 0.0625F,
                             .chunk_tokens = kLossChunk},
                            dhidden, dweight);
    };
  });
}

// Per parameter: the flat buffers of the optimizer.
void OptimizerCases(Bench& bench) {
  const int64_t n = bench.smoke() ? 4096 : int64_t{1} << 28;
  const auto elements = static_cast<double>(n);
  Case what;
  what.section = "optimizer";
  what.shape = Shape({n});
  what.tokens = 0;
  what.name = "adamw";
  what.bytes = 30 * elements;
  what.set_bytes = 18 * elements;
  what.note = "master, gradient, both moments, rounded copy: 30 bytes a parameter";
  bench.Run(what, [&](Arena& arena, int) {
    const Tensor param = bench.Random(arena, DType::kF32, {n}, 0.02F);
    const Tensor grad = bench.Random(arena, DType::kF32, {n}, 0.02F);
    const Tensor m = bench.Random(arena, DType::kF32, {n}, 0.02F);
    const Tensor v = bench.New(arena, DType::kF32, {n});
    bench.device().Zero(v.raw(), static_cast<size_t>(n) * sizeof(float));
    const Tensor rounded = bench.New(arena, DType::kBF16, {n});
    return [=, &bench](int) {
      kernels::AdamWStep(bench.ctx(), param, grad, m, v, {.learning_rate = 1e-4, .step = 10},
                         rounded);
    };
  });
  what.name = "sum_of_squares";
  what.bytes = 4 * elements;
  what.set_bytes = 4 * elements;
  what.note = "waits for its result";
  bench.Run(what, [&](Arena& arena, int) {
    const Tensor x = bench.Random(arena, DType::kF32, {n});
    return [=, &bench](int) { kernels::SumOfSquares(bench.ctx(), x); };
  });
}

// C = A B^T and its kin, `sets` operands each.
void Product(Bench& bench, const std::string& section, const std::string& name, int64_t m,
             int64_t n, int64_t k, DType result, const std::string& note) {
  Case what;
  what.section = section;
  what.name = name;
  what.shape = std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k);
  what.tokens = m;
  what.flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  what.set_bytes = 2.0 * static_cast<double>(m * k + n * k) +
                   static_cast<double>(SizeOf(result)) * static_cast<double>(m * n);
  what.note = note;
  bench.Run(what, [&](Arena& arena, int sets) {
    auto all = MakeSets<Tensors>(sets, [&] {
      return Tensors{.a = bench.Random(arena, DType::kBF16, {m, k}),
                     .b = bench.Random(arena, DType::kBF16, {n, k}, 0.02F),
                     .c = bench.New(arena, result, {m, n})};
    });
    return [all, &bench](int set) {
      const Tensors& t = all[static_cast<size_t>(set)];
      kernels::GemmNT(bench.ctx(), t.a, t.b, t.c);
    };
  });
}

}  // namespace

void LimitCases(Bench& bench) {
  const int64_t side = bench.smoke() ? 64 : 8192;
  Product(bench, "limits", "limit_product", side, side, side, DType::kBF16,
          "bf16, cuBLASLt, random data");
  // At least 16 times the L2 cache, and no less than 1 GiB each way.
  const int64_t bytes =
      bench.smoke()
          ? 4096
          : std::max(int64_t{1} << 30, static_cast<int64_t>(bench.device().info().l2_bytes) * 16);
  Case what;
  what.section = "limits";
  what.name = "limit_copy";
  what.shape = std::to_string(bytes) + " bytes";
  what.bytes = 2 * static_cast<double>(bytes);
  what.set_bytes = 2 * static_cast<double>(bytes);
  what.note = "device to device, bytes read and written";
  bench.Run(what, [&](Arena& arena, int) {
    const Tensor from = bench.Random(arena, DType::kBF16, {bytes / 2});
    const Tensor to = bench.New(arena, DType::kBF16, {bytes / 2});
    return
        [=, &bench](int) { bench.device().Copy(to.raw(), from.raw(), static_cast<size_t>(bytes)); };
  });
}

void ProductCases(Bench& bench) {
  const model::ModelConfig model = HybridStack(bench.smoke(), 1);
  const int64_t h = model.hidden_size;
  const int64_t a = model.attention_width();
  struct Map {
    const char* name;
    int64_t out, in;
  };
  const Map maps[] = {{"sparse_inputs", 2 * a + 2 * model.kv_width(), h},
                      {"lightning_inputs", 4 * model.lightning_width(), h},
                      {"mixer_output", h, a},
                      {"mlp_inputs", 2 * model.intermediate_size, h},
                      {"mlp_output", h, model.intermediate_size},
                      {"head", model.vocab_size, h}};
  for (const int64_t tokens :
       bench.smoke() ? std::vector<int64_t>{40} : std::vector<int64_t>{4096, 32768}) {
    for (const Map& map : maps) {
      const std::string name = map.name;
      if (name == "head" && tokens > 4096) continue;  // taken in chunks of tokens
      const bool logits = name == "head";
      Product(bench, "products", name + "_forward", tokens, map.out, map.in,
              logits ? DType::kF32 : DType::kBF16, "x W^T");
      Case what;
      what.section = "products";
      what.tokens = tokens;
      what.flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(map.out) *
                   static_cast<double>(map.in);
      what.name = name + "_input_gradient";
      what.shape =
          std::to_string(tokens) + " x " + std::to_string(map.in) + " x " + std::to_string(map.out);
      what.set_bytes = 2.0 * static_cast<double>(tokens * (map.out + map.in) + map.out * map.in);
      what.note = "dy W";
      const auto operands = [&, map](Arena& arena, bool weight_gradient) {
        Tensors t;
        t.a = bench.Random(arena, DType::kBF16, {tokens, map.out});
        t.b = weight_gradient ? bench.Random(arena, DType::kF32, {map.out, map.in}, 0.02F)
                              : bench.Random(arena, DType::kBF16, {map.out, map.in}, 0.02F);
        t.c = bench.Random(arena, DType::kBF16, {tokens, map.in});
        return t;
      };
      bench.Run(what, [&](Arena& arena, int sets) {
        auto all = MakeSets<Tensors>(sets, [&] { return operands(arena, false); });
        return [all, &bench](int set) {
          const Tensors& t = all[static_cast<size_t>(set)];
          kernels::GemmNN(bench.ctx(), t.a, t.b, t.c);
        };
      });
      what.name = name + "_weight_gradient";
      what.shape =
          std::to_string(map.out) + " x " + std::to_string(map.in) + " x " + std::to_string(tokens);
      what.set_bytes = 2.0 * static_cast<double>(tokens * (map.out + map.in)) +
                       4.0 * static_cast<double>(map.out * map.in);
      what.note = "dy^T x, accumulated in float32";
      bench.Run(what, [&](Arena& arena, int sets) {
        auto all = MakeSets<Tensors>(sets, [&] { return operands(arena, true); });
        return [all, &bench](int set) {
          const Tensors& t = all[static_cast<size_t>(set)];
          kernels::GemmTN(bench.ctx(), t.a, t.c, t.b, {.write = Write::kAccumulate});
        };
      });
    }
  }
}

void TokenCases(Bench& bench) {
  const model::ModelConfig model = HybridStack(bench.smoke(), 4);
  for (const int64_t tokens : TokenCounts(bench.smoke())) {
    NormCases(bench, model, tokens);
    RopeCases(bench, model, tokens);
    MlpCases(bench, model, tokens);
    EmbeddingCases(bench, model, tokens);
    if (tokens <= 32768) LossCases(bench, model, tokens);
  }
  OptimizerCases(bench);
}

}  // namespace sala::bench
