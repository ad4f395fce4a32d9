// An attention case with its block selection.
#pragma once

#include <vector>

#include "kernels/sparse_attention/reference.h"
#include "kernels/sparse_attention/sparse_attention.h"
#include "tests/kernels/attention/attention_case.h"

namespace sala::kernels {

// 3 local blocks, 1 initial, 3 free of 16 tokens each: selection is active from token 112 on.
inline SparseAttentionConfig SmallConfig() {
  SparseAttentionConfig config;
  config.kernel_size = 8;
  config.kernel_stride = 4;
  config.block_size = 16;
  config.window_size = 32;
  config.topk = 5;
  return config;
}

struct SparseCase : AttentionCase {
  SparseCase(int64_t tokens, const HeadCounts& h, const SparseAttentionConfig& c, unsigned seed = 1)
      : AttentionCase(tokens, h, seed), config(c) {
    chosen.assign(static_cast<size_t>(tokens * h.kv * width()), kPoison);
  }

  int64_t width() const { return std::max<int64_t>(1, config.free_blocks()); }
  // A row for each query.
  Tensor Blocks() { return Tensor(chosen.data(), {q.rows(), heads.kv, width()}); }
  const int32_t* BlocksOf(int64_t token, int64_t g) const {
    return chosen.data() + (token * heads.kv + g) * width();
  }

  void Select(const Context& ctx, const std::vector<DocumentRange>& documents,
              int64_t first_query = 0) {
    SelectBlocks(ctx, Wide(q), Narrow(k), documents, config, scale(), Blocks(), first_query);
  }
  void Forward(const Context& ctx, const std::vector<DocumentRange>& documents,
               int64_t first_query = 0) {
    SparseAttentionForward(ctx, Wide(q), Narrow(k), Narrow(v), documents, config, scale(), Blocks(),
                           Wide(out), lse.tensor(), first_query);
  }
  void Backward(const Context& ctx, const std::vector<DocumentRange>& documents,
                int64_t first_query = 0) {
    SparseAttentionBackward(ctx, Wide(q), Narrow(k), Narrow(v), Wide(out), lse.tensor(), Wide(dout),
                            documents, config, scale(), Blocks(), Wide(dq), Narrow(dk), Narrow(dv),
                            first_query);
  }
  void Run(const Context& ctx, const std::vector<DocumentRange>& documents,
           int64_t first_query = 0) {
    Select(ctx, documents, first_query);
    Forward(ctx, documents, first_query);
    Backward(ctx, documents, first_query);
  }

  SparseCase SparsePiece(const DocumentRange& range) const {
    SparseCase piece(range.length(), heads, config);
    static_cast<AttentionCase&>(piece) = Piece(range);
    return piece;
  }

  // Blocks token t of a document at token 0 sees, forced and chosen, ascending.
  std::vector<int64_t> Seen(int64_t token, int64_t g) const {
    std::vector<int64_t> seen;
    const int64_t own = token / config.block_size;
    for (int64_t b = 0; b <= own; ++b) {
      const int32_t* row = BlocksOf(token, g);
      const bool forced = b < config.init_blocks || b > own - config.local_blocks();
      if (forced || std::find(row, row + width(), b) != row + width()) seen.push_back(b);
    }
    return seen;
  }
  // The keys of those blocks, for the reference.
  reference::Attends SeenKeys() const {
    std::vector<std::vector<int64_t>> seen;
    for (int64_t token = 0; token < t; ++token) {
      for (int64_t g = 0; g < heads.kv; ++g) seen.push_back(Seen(token, g));
    }
    return [seen, kv = heads.kv, block = config.block_size](int64_t token, int64_t g, int64_t j) {
      const auto& row = seen[static_cast<size_t>(token * kv + g)];
      return std::binary_search(row.begin(), row.end(), j / block);
    };
  }

  static constexpr int32_t kPoison = -77;
  SparseAttentionConfig config;
  std::vector<int32_t> chosen;
};

// The rules of form for every token's list: the free blocks only, ascending, then kNoBlock; all of
// them where they fit.
inline void ExpectWellFormed(const SparseCase& c) {
  for (int64_t t = 0; t < c.t; ++t) {
    const int64_t own = t / c.config.block_size;
    const int64_t last = std::max<int64_t>(0, own - c.config.local_blocks() + 1);
    const int64_t candidates = std::max<int64_t>(0, last - c.config.init_blocks);
    const int64_t expected = std::min(candidates, c.config.free_blocks());
    for (int64_t g = 0; g < c.heads.kv; ++g) {
      const int32_t* row = c.BlocksOf(t, g);
      for (int64_t f = 0; f < c.width(); ++f) {
        if (f >= expected) {
          ASSERT_EQ(row[f], kNoBlock) << "token " << t;
          continue;
        }
        ASSERT_GE(row[f], f == 0 ? c.config.init_blocks : row[f - 1] + 1) << "token " << t;
        ASSERT_LT(row[f], last) << "token " << t;
      }
    }
  }
}

// The kernel's choice for one token equals the rule's, except for blocks whose scores lie within
// 1e-5 relative of each other: scores are sums of at most 16 exponentials of float32 products, each
// good to about 1e-6.
inline void ExpectChoice(const SparseCase& c, const reference::Selection& expected, int64_t t,
                         int64_t g) {
  const std::vector<int64_t> seen = c.Seen(t, g);
  ASSERT_EQ(seen.size(), expected.chosen.size()) << "token " << t;
  std::vector<int64_t> only_found;
  std::vector<int64_t> only_expected;
  std::set_difference(seen.begin(), seen.end(), expected.chosen.begin(), expected.chosen.end(),
                      std::back_inserter(only_found));
  std::set_difference(expected.chosen.begin(), expected.chosen.end(), seen.begin(), seen.end(),
                      std::back_inserter(only_expected));
  for (int64_t a : only_expected) {
    for (int64_t b : only_found) {
      const double x = expected.scores[static_cast<size_t>(a)];
      const double y = expected.scores[static_cast<size_t>(b)];
      ASSERT_LE(std::abs(x - y), 1e-5 * std::abs(x))
          << "token " << t << ": block " << b << " taken instead of " << a;
    }
  }
}

}  // namespace sala::kernels
