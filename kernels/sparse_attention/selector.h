// Which blocks a query sees: the forced ones, and the free ones by score (docs/math/attention.md).
// Not part of the room's interface.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention/block_attention.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels {

// The blocks that are neither initial nor local for a query whose own block is `own`: [first,
// last).
struct BlockSpan {
  int64_t first = 0;
  int64_t last = 0;
};
BlockSpan CandidateBlocks(const SparseAttentionConfig& config, int64_t own);

// The compressed keys of one document and key/value head: first rows, and elements between rows.
struct CompressedKeys {
  const float* fine = nullptr;
  const float* coarse = nullptr;
  int64_t stride = 0;
};

// Work space of one thread for tiles of at most `tokens` tokens in documents of at most `n` tokens.
class SelectorWork {
 public:
  SelectorWork(const Context& ctx, const SparseAttentionConfig& config, int64_t n, int64_t tokens,
               int64_t group, int64_t d);

  // The tile's queries [count * group, d], to be filled before SelectTile.
  float* queries() const { return queries_; }

 private:
  friend class TileSelector;
  float* queries_;
  float* scores_;     // [tokens * group, kKeyTile]
  float* max_;        // [tokens * group]; then the log-sum-exp
  float* sum_;        // [tokens * group]
  float* relevance_;  // [tokens, fine keys]
  float* gemm_;
  std::vector<float> block_score_;
  std::vector<int32_t> order_;
};

// Writes the free blocks of every token of `tile` to `chosen` [tile.count, max(1, free_blocks)],
// rows `chosen_stride` apart.
void SelectTile(const SparseAttentionConfig& config, const CompressedKeys& keys, float scale,
                const QueryTile& tile, int64_t group, int64_t d, SelectorWork& work,
                int32_t* chosen, int64_t chosen_stride);

}  // namespace sala::kernels
