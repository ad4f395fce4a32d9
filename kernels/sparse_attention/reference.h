// Block selection in plain loops and double, as the rule is stated (docs/math/attention.md): all
// blocks scored, forced ones infinite, the best total_blocks() taken, those after the own block
// dropped. With reference::AttendRow and its relatives it is the standard for the kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/attention/reference.h"
#include "kernels/common/stored.h"
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels::reference {

// Means of k [n, K, D] over full windows: [count, K * D].
template <typename Stored = Exact>
std::vector<std::vector<double>> WindowMeans(const AttentionShape& shape,
                                             const std::vector<double>& k, int64_t size,
                                             int64_t stride, const Stored& stored = {}) {
  std::vector<std::vector<double>> means;
  const int64_t width = shape.kv_heads * shape.d;
  for (int64_t begin = 0; begin + size <= shape.n; begin += stride) {
    std::vector<double> mean(static_cast<size_t>(width));
    for (int64_t t = begin; t < begin + size; ++t) {
      for (int64_t c = 0; c < width; ++c) {
        mean[static_cast<size_t>(c)] +=
            k[static_cast<size_t>(t * width + c)] / static_cast<double>(size);
      }
    }
    for (double& value : mean) value = stored(value);
    means.push_back(mean);
  }
  return means;
}

struct Compressed {
  std::vector<std::vector<double>> fine, coarse;
};

template <typename Stored = Exact>
Compressed CompressKeys(const AttentionShape& shape, const std::vector<double>& k,
                        const SparseAttentionConfig& config, const Stored& stored = {}) {
  return {WindowMeans(shape, k, config.kernel_size, config.kernel_stride, stored),
          WindowMeans(shape, k, config.coarse_size(), config.coarse_stride(), stored)};
}

// R of the fine keys for token t under key/value head g: sum over the group's heads of exp(scale
// q.fine - Z), Z the log of the sum of exponentials over the visible coarse keys; 0 where not
// visible or where no coarse key is visible. The sum is stored.
template <typename Stored = Exact>
std::vector<double> Relevance(const AttentionShape& shape, const std::vector<double>& q,
                              const Compressed& keys, const SparseAttentionConfig& config,
                              int64_t t, int64_t g, const Stored& stored = {}) {
  std::vector<double> relevance(keys.fine.size());
  const auto score = [&](int64_t h, const std::vector<double>& key) {
    return shape.scale * Dot(q.data() + shape.Query(t, h), key.data() + g * shape.d, shape.d);
  };
  for (int64_t h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
    std::vector<double> coarse;
    for (size_t i = 0; i < keys.coarse.size(); ++i) {
      const int64_t last =
          static_cast<int64_t>(i) * config.coarse_stride() + config.coarse_size() - 1;
      if (last <= t) coarse.push_back(score(h, keys.coarse[i]));
    }
    if (coarse.empty()) return relevance;
    const double largest = *std::max_element(coarse.begin(), coarse.end());
    double sum = 0;
    for (const double x : coarse) sum += std::exp(x - largest);
    const double normaliser = largest + std::log(sum);
    for (size_t i = 0; i < keys.fine.size(); ++i) {
      const int64_t last = static_cast<int64_t>(i) * config.kernel_stride + config.kernel_size - 1;
      if (last <= t) relevance[i] += std::exp(std::min(score(h, keys.fine[i]) - normaliser, 80.0));
    }
  }
  for (double& value : relevance) value = stored(value);
  return relevance;
}

struct Selection {
  std::vector<double> relevance;  // per fine key
  std::vector<double> scores;     // per block of the document; forced ones infinite
  std::vector<int64_t> chosen;    // ascending, forced ones included
};

// The largest relevance of the fine windows that overlap block b, without the first `skip` of them;
// 0 where there is none.
inline double BlockScore(const std::vector<double>& relevance, const SparseAttentionConfig& config,
                         int64_t b, int64_t skip = 0) {
  const int64_t per_block = config.block_size / config.kernel_stride;
  double score = 0;
  for (int64_t i = per_block * b - 1 + skip; i <= per_block * b + per_block - 1; ++i) {
    if (i >= 0 && i < static_cast<int64_t>(relevance.size())) {
      score = std::max(score, relevance[static_cast<size_t>(i)]);
    }
  }
  return score;
}

template <typename Stored = Exact>
Selection Select(const AttentionShape& shape, const std::vector<double>& q, const Compressed& keys,
                 const SparseAttentionConfig& config, int64_t t, int64_t g,
                 const Stored& stored = {}) {
  Selection selection;
  selection.relevance = Relevance(shape, q, keys, config, t, g, stored);
  const int64_t own = t / config.block_size;
  std::vector<int64_t> order;
  for (int64_t b = 0; b * config.block_size < shape.n; ++b) {
    double score = BlockScore(selection.relevance, config, b);
    const bool local = own - config.window_size / config.block_size <= b && b <= own;
    // Later blocks see nothing; below zero they also lose every tie.
    if (b > own) score = -1;
    if (b < config.init_blocks || local) score = std::numeric_limits<double>::infinity();
    selection.scores.push_back(score);
    order.push_back(b);
  }
  std::stable_sort(order.begin(), order.end(), [&selection](int64_t a, int64_t b) {
    return selection.scores[static_cast<size_t>(a)] > selection.scores[static_cast<size_t>(b)];
  });
  order.resize(std::min(order.size(), static_cast<size_t>(config.total_blocks())));
  for (int64_t b : order) {
    if (b <= own) selection.chosen.push_back(b);
  }
  std::sort(selection.chosen.begin(), selection.chosen.end());
  return selection;
}

// By what part of itself a chosen block's score exceeds that of a rejected one, for the closest two
// of token t: scores with relative errors below half of it choose the same blocks. Infinity where
// no past block is rejected. Ties that every arithmetic has do not count: neighbours share a
// window, which alone cannot lift the later one above the earlier one, and where no coarse key is
// visible all scores are zero.
inline double SelectionMargin(const Selection& selection, const SparseAttentionConfig& config,
                              int64_t t) {
  std::vector<int64_t> rejected;
  for (int64_t b = 0; b <= t / config.block_size; ++b) {
    if (!std::binary_search(selection.chosen.begin(), selection.chosen.end(), b))
      rejected.push_back(b);
  }
  double margin = std::numeric_limits<double>::infinity();
  for (const int64_t b : selection.chosen) {
    const double score = selection.scores[static_cast<size_t>(b)];
    if (std::isinf(score) || score == 0) continue;
    for (const int64_t other : rejected) {
      const double rival = BlockScore(selection.relevance, config, other, other == b + 1 ? 1 : 0);
      margin = std::min(margin, (score - rival) / score);
    }
  }
  return margin;
}

}  // namespace sala::kernels::reference
