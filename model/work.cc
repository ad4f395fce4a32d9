#include "model/work.h"

#include <algorithm>

#include "model/parameters.h"

namespace sala::model {

double CausalPairs(int64_t n) {
  const auto x = static_cast<double>(n);
  return x * (x + 1) / 2;
}

double SparsePairs(const kernels::SparseAttentionConfig& config, int64_t n) {
  const int64_t block = config.block_size;
  const int64_t budget = config.total_blocks() * block;  // below this every past block is chosen
  double pairs = CausalPairs(std::min(n, budget));
  const int64_t rest = std::max<int64_t>(0, n - budget);
  pairs += static_cast<double>(rest) * static_cast<double>((config.total_blocks() - 1) * block);
  // And in the token's own block, of whole blocks and the last part of one.
  const int64_t whole = rest / block;
  pairs += static_cast<double>(whole) * CausalPairs(block) + CausalPairs(rest % block);
  return pairs;
}

double SelectionKeys(const kernels::SparseAttentionConfig& config, int64_t n) {
  // A count steps up by one at some length and then every `stride` tokens: lengths up to n are runs
  // of `stride` with 1, 2, ... keys, and a rest.
  const auto summed = [n](auto count, int64_t stride) {
    const auto keys = static_cast<double>(count(n));
    if (keys == 0) return 0.0;
    int64_t last = n;  // the first length with as many keys
    while (last > 1 && count(last - 1) == count(n)) --last;
    return static_cast<double>(stride) * keys * (keys - 1) / 2 +
           keys * static_cast<double>(n - last + 1);
  };
  return summed([&config](int64_t m) { return kernels::FineCount(config, m); },
                config.kernel_stride) +
         summed([&config](int64_t m) { return kernels::CoarseCount(config, m); },
                config.coarse_stride());
}

ProductWeights ProductWeightsOf(const ModelConfig& config) {
  ProductWeights weights;
  weights.head = static_cast<double>(config.vocab_size * config.hidden_size);
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    const MixerType type = config.mixer(layer);
    double& mixer = type == MixerType::kSoftmax ? weights.softmax : weights.linear;
    for (const ParameterSpec& spec : MixerSpecs(config, layer, type)) {
      if (spec.kind == ParameterKind::kMatrix) mixer += static_cast<double>(spec.numel);
    }
    weights.mlp += 3.0 * static_cast<double>(config.hidden_size * config.intermediate_size);
  }
  return weights;
}

double ProductParameters(const ModelConfig& config) { return ProductWeightsOf(config).all(); }

ForwardWork ForwardWorkOf(const ModelConfig& config, bool sparse, int64_t n) {
  ForwardWork work;
  work.products = 2 * ProductParameters(config) * static_cast<double>(n);
  const bool selects = sparse && n >= config.sparse.dense_len;
  const double pairs = selects ? SparsePairs(config.sparse, n) : CausalPairs(n);
  const double keys = selects ? SelectionKeys(config.sparse, n) : 0;
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (config.mixer(layer) == MixerType::kSoftmax) {
      const auto width = static_cast<double>(config.attention_width());
      work.attention += 4 * width * pairs;
      work.selection += 2 * width * keys;
    } else {
      work.lightning += 4 * static_cast<double>(config.lightning_width()) *
                        static_cast<double>(config.lightning_head_dim) * static_cast<double>(n);
    }
  }
  return work;
}

}  // namespace sala::model
