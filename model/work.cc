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
  for (int64_t t = budget; t < n; ++t) {
    pairs += static_cast<double>((config.total_blocks() - 1) * block + t % block + 1);
  }
  return pairs;
}

double SelectionKeys(const kernels::SparseAttentionConfig& config, int64_t n) {
  double keys = 0;
  for (int64_t t = 0; t < n; ++t) {
    keys += static_cast<double>(kernels::FineCount(config, t + 1));
    keys += static_cast<double>(kernels::CoarseCount(config, t + 1));
  }
  return keys;
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
