#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "core/check.h"
#include "kernels/cuda_kernels.h"
#include "model/work.h"
#include "tests/cuda/bench/cases.h"
#include "tests/cuda/bench/shapes.h"

namespace sala::bench {
namespace {

using kernels::DocumentRange;
using kernels::SparseAttentionConfig;

struct Operands {
  Tensor q{}, k{}, v{}, out{}, lse{}, dout{}, dq{}, dk{}, dv{};
};

// One document of `tokens` tokens of the model's softmax layers, or of its Lightning layers.
struct Problem {
  int64_t tokens, heads, kv_heads, head_dim;
  float scale;
  std::vector<DocumentRange> documents;

  Problem(const model::ModelConfig& model, bool softmax, int64_t n)
      : tokens(n),
        heads(softmax ? model.num_attention_heads : model.lightning_nh),
        kv_heads(softmax ? model.num_key_value_heads : model.lightning_nh),
        head_dim(softmax ? model.head_dim : model.lightning_head_dim),
        scale(static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)))),
        documents({{0, n}}) {}

  double width() const { return static_cast<double>(heads * head_dim); }
  double kv_width() const { return static_cast<double>(kv_heads * head_dim); }
  // q, k, v and out; with the backward pass also dout, dq, dk and dv; and lse.
  double Bytes(bool backward) const {
    const double one = 2 * width() + 2 * kv_width();
    return static_cast<double>(tokens) *
           (2 * one + (backward ? 2 * one : 0) + 4 * static_cast<double>(heads));
  }
  std::string Shape() const {
    return "[" + std::to_string(tokens) + ", " + std::to_string(heads) + "/" +
           std::to_string(kv_heads) + ", " + std::to_string(head_dim) + "]";
  }
};

Operands Make(Bench& bench, Arena& arena, const Problem& p, bool backward) {
  const auto random = [&](int64_t heads) {
    return bench.Random(arena, DType::kBF16, {p.tokens, heads, p.head_dim});
  };
  Operands o{.q = random(p.heads), .k = random(p.kv_heads), .v = random(p.kv_heads)};
  o.out = random(p.heads);
  o.lse = bench.Random(arena, DType::kF32, {p.tokens, p.heads});
  if (backward) {
    o.dout = random(p.heads);
    o.dq = random(p.heads);
    o.dk = random(p.kv_heads);
    o.dv = random(p.kv_heads);
  }
  return o;
}

void DenseCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  const Problem p(model, true, tokens);
  Case what;
  what.section = "mixers";
  what.shape = p.Shape();
  what.tokens = tokens;
  what.name = "dense_attention_forward";
  what.flops = 4 * p.width() * model::CausalPairs(tokens);
  what.set_bytes = p.Bytes(false);
  bench.Run(what, [&](Arena& arena, int sets) {
    std::vector<Operands> all;
    for (int i = 0; i < sets; ++i) all.push_back(Make(bench, arena, p, false));
    return [all, p, &bench](int set) {
      const Operands& o = all[static_cast<size_t>(set)];
      kernels::AttentionForward(bench.ctx(), o.q, o.k, o.v, p.documents, p.scale, o.out, o.lse);
    };
  });
  what.name = "dense_attention_backward";
  what.flops *= 2.5;
  what.set_bytes = p.Bytes(true);
  bench.Run(what, [&](Arena& arena, int sets) {
    std::vector<Operands> all;
    for (int i = 0; i < sets; ++i) {
      all.push_back(Make(bench, arena, p, true));
      const Operands& o = all.back();
      kernels::AttentionForward(bench.ctx(), o.q, o.k, o.v, p.documents, p.scale, o.out, o.lse);
    }
    return [all, p, &bench](int set) {
      const Operands& o = all[static_cast<size_t>(set)];
      kernels::AttentionBackward(bench.ctx(), o.q, o.k, o.v, o.out, o.lse, o.dout, p.documents,
                                 p.scale, o.dq, o.dk, o.dv);
    };
  });
}

// Free blocks for every token and key/value head, [tokens, kv_heads, free_blocks], drawn evenly
// from those that are neither initial nor local: once for each block of tokens (`shared`, the most
// that neighbours can have in common), or for each token by itself (the least). What a trained
// model chooses lies between.
std::vector<int32_t> DrawBlocks(const SparseAttentionConfig& config, const Problem& p,
                                bool shared) {
  const int64_t free = std::max<int64_t>(1, config.free_blocks());
  std::vector<int32_t> blocks(static_cast<size_t>(p.tokens * p.kv_heads * free), kernels::kNoBlock);
  std::mt19937 engine(shared ? 3 : 4);
  std::vector<int32_t> candidates;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t own = t / config.block_size;
    const int64_t first = config.init_blocks;
    const int64_t last = own - config.local_blocks() + 1;  // one behind the candidates
    if (last <= first) continue;
    for (int64_t g = 0; g < p.kv_heads; ++g) {
      int32_t* chosen = blocks.data() + (t * p.kv_heads + g) * free;
      if (shared && t % config.block_size != 0) {
        std::copy_n(chosen - p.kv_heads * free, free, chosen);
        continue;
      }
      const int64_t count = std::min(free, last - first);
      // Selection sampling: rising, each set as likely as any other (Knuth, The Art of Computer
      // Programming, 3.4.2, algorithm S).
      int64_t taken = 0;
      for (int64_t b = first; b < last && taken < count; ++b) {
        const auto left = static_cast<uint32_t>(last - b);
        if (static_cast<int64_t>(static_cast<uint32_t>(engine()) % left) < count - taken)
          chosen[taken++] = static_cast<int32_t>(b);
      }
    }
  }
  return blocks;
}

void SparseCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  const Problem p(model, true, tokens);
  const SparseAttentionConfig config = model.sparse;
  const int64_t free = std::max<int64_t>(1, config.free_blocks());
  const auto t = static_cast<double>(tokens);
  const double list_bytes = 4 * t * static_cast<double>(p.kv_heads * free);
  Case what;
  what.section = "mixers";
  what.shape = p.Shape();
  what.tokens = tokens;

  const int64_t fine = kernels::FineCount(config, tokens);
  const int64_t coarse = kernels::CoarseCount(config, tokens);
  what.name = "compress_keys";
  what.bytes = 2 * p.kv_width() * (t + static_cast<double>(fine + coarse));
  what.set_bytes = what.bytes;
  bench.Run(what, [&](Arena& arena, int sets) {
    std::vector<Operands> all;
    for (int i = 0; i < sets; ++i) {
      all.push_back({.k = bench.Random(arena, DType::kBF16, {tokens, p.kv_heads, p.head_dim}),
                     .out = bench.New(arena, DType::kBF16, {fine, p.kv_heads, p.head_dim}),
                     .dout = bench.New(arena, DType::kBF16, {coarse, p.kv_heads, p.head_dim})});
    }
    return [all, p, config, &bench](int set) {
      const Operands& o = all[static_cast<size_t>(set)];
      kernels::CompressKeys(bench.ctx(), o.k, p.documents, config, o.out, o.dout);
    };
  });
  what.name = "select_blocks";
  what.bytes = 0;
  what.flops = 2 * p.width() * model::SelectionKeys(config, tokens);
  what.set_bytes = 2 * t * (p.width() + p.kv_width()) + list_bytes;
  what.note = "key compression included";
  bench.Run(what, [&](Arena& arena, int sets) {
    std::vector<Operands> all;
    for (int i = 0; i < sets; ++i) {
      all.push_back({.q = bench.Random(arena, DType::kBF16, {tokens, p.heads, p.head_dim}),
                     .k = bench.Random(arena, DType::kBF16, {tokens, p.kv_heads, p.head_dim}),
                     .out = bench.New(arena, DType::kI32, {tokens, p.kv_heads, free})});
    }
    return [all, p, config, &bench](int set) {
      const Operands& o = all[static_cast<size_t>(set)];
      kernels::SelectBlocks(bench.ctx(), o.q, o.k, p.documents, config, p.scale, o.out);
    };
  });

  for (const bool shared : {true, false}) {
    const std::string suffix = shared ? "_shared" : "_scattered";
    if (!bench.Wanted("sparse_attention_forward" + suffix) &&
        !bench.Wanted("sparse_attention_backward" + suffix))
      continue;
    Arena lists(size_t{1} << 20, &bench.device());
    const Tensor blocks = bench.New(lists, DType::kI32, {tokens, p.kv_heads, free});
    const std::vector<int32_t> drawn = DrawBlocks(config, p, shared);
    bench.device().Upload(blocks.raw(), drawn.data(), drawn.size() * sizeof(int32_t));
    what.note = shared ? "64 neighbours chose the same free blocks" : "each token chose by itself";
    what.name = "sparse_attention_forward" + suffix;
    what.flops = 4 * p.width() * model::SparsePairs(config, tokens);
    what.set_bytes = p.Bytes(false);
    bench.Run(what, [&](Arena& arena, int sets) {
      std::vector<Operands> all;
      for (int i = 0; i < sets; ++i) all.push_back(Make(bench, arena, p, false));
      return [all, p, config, blocks, &bench](int set) {
        const Operands& o = all[static_cast<size_t>(set)];
        kernels::SparseAttentionForward(bench.ctx(), o.q, o.k, o.v, p.documents, config, p.scale,
                                        blocks, o.out, o.lse);
      };
    });
    what.name = "sparse_attention_backward" + suffix;
    what.flops *= 2.5;
    what.set_bytes = p.Bytes(true);
    bench.Run(what, [&](Arena& arena, int sets) {
      std::vector<Operands> all;
      for (int i = 0; i < sets; ++i) {
        all.push_back(Make(bench, arena, p, true));
        const Operands& o = all.back();
        kernels::SparseAttentionForward(bench.ctx(), o.q, o.k, o.v, p.documents, config, p.scale,
                                        blocks, o.out, o.lse);
      }
      return [all, p, config, blocks, &bench](int set) {
        const Operands& o = all[static_cast<size_t>(set)];
        kernels::SparseAttentionBackward(bench.ctx(), o.q, o.k, o.v, o.out, o.lse, o.dout,
                                         p.documents, config, p.scale, blocks, o.dq, o.dk, o.dv);
      };
    });
  }
}

void LightningCases(Bench& bench, const model::ModelConfig& model, int64_t tokens) {
  const Problem p(model, false, tokens);
  const std::vector<int32_t> borders = {0, static_cast<int32_t>(tokens)};
  const std::vector<float> slopes = kernels::LightningSlopes(p.heads);
  const auto t = static_cast<double>(tokens);
  Case what;
  what.section = "mixers";
  what.shape = p.Shape();
  what.tokens = tokens;
  what.name = "lightning_forward";
  what.bytes = 8 * p.width() * t;
  what.set_bytes = p.Bytes(false);
  what.available = kernels::Cuda(bench.ctx()).LightningForward != nullptr;
  what.note = "q, k, v read, o written";
  bench.Run(what, [&](Arena& arena, int sets) {
    std::vector<Operands> all;
    for (int i = 0; i < sets; ++i) all.push_back(Make(bench, arena, p, false));
    return [all, p, borders, slopes, &bench](int set) {
      const Operands& o = all[static_cast<size_t>(set)];
      kernels::LightningForward(bench.ctx(), o.q, o.k, o.v, borders, slopes, p.scale, {}, o.out,
                                {});
    };
  });
  what.name = "lightning_backward";
  what.bytes = 14 * p.width() * t;
  what.set_bytes = p.Bytes(true);
  what.available = kernels::Cuda(bench.ctx()).LightningBackward != nullptr;
  what.note = "q, k, v, do read, dq, dk, dv written";
  bench.Run(what, [&](Arena& arena, int sets) {
    std::vector<Operands> all;
    for (int i = 0; i < sets; ++i) all.push_back(Make(bench, arena, p, true));
    return [all, p, borders, slopes, &bench](int set) {
      const Operands& o = all[static_cast<size_t>(set)];
      kernels::LightningBackward(bench.ctx(), o.q, o.k, o.v, o.dout, borders, slopes, p.scale, {},
                                 {}, o.dq, o.dk, o.dv, {});
    };
  });
}

// The passes over a whole document of a softmax layer go with the square of its length; those with
// blocks do not.
std::vector<int64_t> Lengths(bool smoke, bool sparse) {
  if (smoke) return {sparse ? int64_t{200} : int64_t{40}};
  if (sparse) return {32768, 131072};
  return {4096, 32768, 131072};
}

}  // namespace

void MixerCases(Bench& bench) {
  const model::ModelConfig model = HybridStack(bench.smoke(), 4);
  for (const int64_t tokens : Lengths(bench.smoke(), false)) {
    LightningCases(bench, model, tokens);
    DenseCases(bench, model, tokens);
  }
  for (const int64_t tokens : Lengths(bench.smoke(), true)) SparseCases(bench, model, tokens);
}

}  // namespace sala::bench
