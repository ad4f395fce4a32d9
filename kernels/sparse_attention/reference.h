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
#include "kernels/sparse_attention/sparse_attention.h"

namespace sala::kernels::reference {

// Means of k [n, K, D] over full windows: [count, K * D].
inline std::vector<std::vector<double>> WindowMeans(const AttentionShape& shape,
                                                    const std::vector<double>& k, int64_t size,
                                                    int64_t stride) {
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
    means.push_back(mean);
  }
  return means;
}

struct Compressed {
  std::vector<std::vector<double>> fine, coarse;
};

inline Compressed CompressKeys(const AttentionShape& shape, const std::vector<double>& k,
                               const SparseAttentionConfig& config) {
  return {WindowMeans(shape, k, config.kernel_size, config.kernel_stride),
          WindowMeans(shape, k, config.coarse_size(), config.coarse_stride())};
}

// R of the fine keys for token t under key/value head g: sum over the group's heads of exp(scale
// q.fine - Z), Z the log of the sum of exponentials over the visible coarse keys; 0 where not
// visible or where no coarse key is visible.
inline std::vector<double> Relevance(const AttentionShape& shape, const std::vector<double>& q,
                                     const Compressed& keys, const SparseAttentionConfig& config,
                                     int64_t t, int64_t g) {
  std::vector<double> relevance(keys.fine.size());
  const auto score = [&](int64_t h, const std::vector<double>& key) {
    return shape.scale * Dot(q.data() + shape.Query(t, h), key.data() + g * shape.d, shape.d);
  };
  for (int64_t h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
    double sum = 0;
    for (size_t i = 0; i < keys.coarse.size(); ++i) {
      const int64_t last =
          static_cast<int64_t>(i) * config.coarse_stride() + config.coarse_size() - 1;
      if (last <= t) sum += std::exp(score(h, keys.coarse[i]));
    }
    if (sum == 0) return relevance;
    for (size_t i = 0; i < keys.fine.size(); ++i) {
      const int64_t last = static_cast<int64_t>(i) * config.kernel_stride + config.kernel_size - 1;
      if (last <= t)
        relevance[i] += std::exp(std::min(score(h, keys.fine[i]) - std::log(sum), 80.0));
    }
  }
  return relevance;
}

struct Selection {
  std::vector<double> scores;   // per block of the document; forced ones infinite
  std::vector<int64_t> chosen;  // ascending, forced ones included
};

inline Selection Select(const AttentionShape& shape, const std::vector<double>& q,
                        const Compressed& keys, const SparseAttentionConfig& config, int64_t t,
                        int64_t g) {
  const std::vector<double> relevance = Relevance(shape, q, keys, config, t, g);
  const int64_t own = t / config.block_size;
  const int64_t per_block = config.block_size / config.kernel_stride;
  Selection selection;
  std::vector<int64_t> order;
  for (int64_t b = 0; b * config.block_size < shape.n; ++b) {
    double score = 0;
    for (int64_t i = per_block * b - 1; i <= per_block * b + per_block - 1; ++i) {
      if (i >= 0 && i < static_cast<int64_t>(relevance.size())) {
        score = std::max(score, relevance[static_cast<size_t>(i)]);
      }
    }
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

}  // namespace sala::kernels::reference
