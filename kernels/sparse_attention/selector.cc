#include "kernels/sparse_attention/selector.h"

#include <algorithm>
#include <limits>

#include "core/elementary.h"
#include "kernels/gemm/serial.h"
#include "kernels/sparse_attention/scores_math.h"

namespace sala::kernels {
namespace {

constexpr int64_t kKeyTile = 128;

// Windows of `stride` apart and 2 * stride long (fine) or 2 * (4 * stride) long (coarse) that end
// at or before token t.
int64_t VisibleWindows(int64_t t, int64_t stride) {
  return std::max<int64_t>(0, (t + 1) / stride - 1);
}

}  // namespace

BlockSpan CandidateBlocks(const SparseAttentionConfig& config, int64_t own) {
  const int64_t last = std::max<int64_t>(0, own - config.local_blocks() + 1);
  return {std::min(config.init_blocks, last), last};
}

SelectorWork::SelectorWork(const Context& ctx, const SparseAttentionConfig& config, int64_t n,
                           int64_t tokens, int64_t group, int64_t d)
    : order_(static_cast<size_t>(n / config.block_size + 1)) {
  const auto floats = [&ctx](int64_t count) {
    return static_cast<float*>(ctx.scratch->Allocate(static_cast<size_t>(count) * sizeof(float)));
  };
  const int64_t rows = tokens * group;
  queries_ = floats(rows * d);
  scores_ = floats(rows * kKeyTile);
  max_ = floats(rows);
  sum_ = floats(rows);
  relevance_ = floats(tokens * (FineCount(config, n) + 1));
  gemm_ = floats(GemmSerialWorkspace(rows, kKeyTile, d));
  block_score_.resize(order_.size());
}

class TileSelector {
 public:
  TileSelector(const SparseAttentionConfig& config, const CompressedKeys& keys, float scale,
               const QueryTile& tile, int64_t group, int64_t d, SelectorWork& work)
      : config_(config),
        keys_(keys),
        scale_(scale),
        tile_(tile),
        group_(group),
        d_(d),
        work_(work),
        candidates_(CandidateBlocks(config, tile.begin / config.block_size)),
        windows_per_block_(config.block_size / config.kernel_stride) {}

  void Run(int32_t* chosen, int64_t stride) {
    const int64_t own = tile_.begin / config_.block_size;
    if (own + 1 <= config_.total_blocks()) {
      TakeAll(chosen, stride);
      return;
    }
    Normalisers();
    Relevance();
    for (int64_t i = 0; i < tile_.count; ++i) TakeBest(i, chosen + i * stride);
  }

 private:
  void TakeAll(int32_t* chosen, int64_t stride) const {
    const int64_t width = std::max<int64_t>(1, config_.free_blocks());
    for (int64_t i = 0; i < tile_.count; ++i) {
      for (int64_t f = 0; f < width; ++f) {
        const int64_t block = candidates_.first + f;
        chosen[i * stride + f] = block < candidates_.last ? static_cast<int32_t>(block) : kNoBlock;
      }
    }
  }

  // Calls body(row, token of the tile, keys of this piece the token sees, first key, scores) for
  // pieces of keys in order.
  template <typename Body>
  void ForEachScoreRow(const float* keys, int64_t key_stride, int64_t limit, const Body& body) {
    const int64_t last_token = tile_.begin + tile_.count - 1;
    const int64_t end = std::min(limit, VisibleWindows(last_token, key_stride));
    for (int64_t j = 0; j < end; j += kKeyTile) {
      const int64_t count = std::min(kKeyTile, end - j);
      GemmSerialNT(tile_.count * group_, count, d_, scale_, work_.queries_, d_,
                   keys + j * keys_.stride, keys_.stride, work_.scores_, kKeyTile,
                   Write::kOverwrite, work_.gemm_);
      for (int64_t row = 0; row < tile_.count * group_; ++row) {
        const int64_t token = row / group_;
        const int64_t visible =
            std::min(count, VisibleWindows(tile_.begin + token, key_stride) - j);
        if (visible > 0) body(row, token, visible, j, work_.scores_ + row * kKeyTile);
      }
    }
  }

  // Log of the sum of exponentials over the visible coarse keys, per row.
  void Normalisers() {
    const int64_t rows = tile_.count * group_;
    std::fill_n(work_.max_, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(work_.sum_, rows, 0.0F);
    ForEachScoreRow(keys_.coarse, config_.coarse_stride(), std::numeric_limits<int64_t>::max(),
                    [this](int64_t row, int64_t, int64_t visible, int64_t, const float* scores) {
                      AccumulateLogSum(scores, visible, work_.max_ + row, work_.sum_ + row);
                    });
    for (int64_t row = 0; row < rows; ++row)
      work_.max_[row] += static_cast<float>(PortableLog(static_cast<double>(work_.sum_[row])));
  }

  // Per token and fine key, the sum of the heads' normalised scores; 0 where no coarse key is
  // visible.
  void Relevance() {
    std::fill_n(work_.relevance_, tile_.count * FineKeys(), 0.0F);
    ForEachScoreRow(
        keys_.fine, config_.kernel_stride, FineKeys(),
        [this](int64_t row, int64_t token, int64_t visible, int64_t first, const float* scores) {
          if (work_.sum_[row] == 0.0F) return;
          AddRelevance(scores, visible, work_.max_[row],
                       work_.relevance_ + token * FineKeys() + first);
        });
  }

  // Fine windows 0 .. that touch a candidate block.
  int64_t FineKeys() const { return candidates_.last * windows_per_block_; }

  void TakeBest(int64_t token, int32_t* chosen) {
    const float* relevance = work_.relevance_ + token * FineKeys();
    auto& score = work_.block_score_;
    for (int64_t b = candidates_.first; b < candidates_.last; ++b) {
      float best = 0.0F;
      const int64_t end = (b + 1) * windows_per_block_;
      for (int64_t j = std::max<int64_t>(0, b * windows_per_block_ - 1); j < end; ++j) {
        best = std::max(best, relevance[j]);
      }
      score[static_cast<size_t>(b)] = best;
    }
    const int64_t free = config_.free_blocks();
    const auto begin = work_.order_.begin();
    const auto end = begin + (candidates_.last - candidates_.first);
    for (auto it = begin; it != end; ++it) {
      *it = static_cast<int32_t>(candidates_.first + (it - begin));
    }
    std::nth_element(begin, begin + free, end, [&score](int32_t a, int32_t b) {
      const float x = score[static_cast<size_t>(a)];
      const float y = score[static_cast<size_t>(b)];
      return x > y || (x == y && a < b);
    });
    std::sort(begin, begin + free);
    std::copy(begin, begin + free, chosen);
    if (free == 0) chosen[0] = kNoBlock;
  }

  const SparseAttentionConfig& config_;
  const CompressedKeys& keys_;
  const float scale_;
  const QueryTile& tile_;
  const int64_t group_;
  const int64_t d_;
  SelectorWork& work_;
  const BlockSpan candidates_;
  const int64_t windows_per_block_;
};

void SelectTile(const SparseAttentionConfig& config, const CompressedKeys& keys, float scale,
                const QueryTile& tile, int64_t group, int64_t d, SelectorWork& work,
                int32_t* chosen, int64_t chosen_stride) {
  TileSelector(config, keys, scale, tile, group, d, work).Run(chosen, chosen_stride);
}

}  // namespace sala::kernels
