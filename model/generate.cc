#include "model/generate.h"

#include <algorithm>
#include <numeric>

#include "core/elementary.h"

namespace sala::model {

int32_t SampleToken(const std::vector<float>& logits, double temperature, double top_p,
                    PhiloxStream& rng) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature <= 0) return static_cast<int32_t>(best - logits.begin());

  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  std::vector<double> weight(logits.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    weight[i] = PortableExp((static_cast<double>(logits[static_cast<size_t>(order[i])]) - *best) /
                            temperature);
    total += weight[i];
  }
  size_t kept = 0;
  double kept_weight = 0;
  while (kept < order.size() && (kept == 0 || kept_weight < top_p * total))
    kept_weight += weight[kept++];

  double draw = rng.NextDouble() * kept_weight;
  for (size_t i = 0; i < kept; ++i) {
    draw -= weight[i];
    if (draw < 0) return order[i];
  }
  return order[kept - 1];
}

std::vector<int32_t> Generate(const Context& ctx, Arena& arena, const Model& model,
                              const std::vector<int32_t>& prompt, const RunOptions& run,
                              const SamplingOptions& sampling,
                              const std::function<bool(int32_t)>& on_token) {
  PhiloxStream rng("v1|" + std::to_string(sampling.seed) + "|generate||0|sample|");
  Cache cache;
  std::vector<float> logits = model.Prefill(ctx, arena, prompt, run, &cache);
  std::vector<int32_t> tokens;
  while (static_cast<int64_t>(tokens.size()) < sampling.max_new_tokens) {
    const int32_t token = SampleToken(logits, sampling.temperature, sampling.top_p, rng);
    if (std::find(sampling.stop_tokens.begin(), sampling.stop_tokens.end(), token) !=
        sampling.stop_tokens.end())
      break;
    tokens.push_back(token);
    if (on_token && !on_token(token)) break;
    if (static_cast<int64_t>(tokens.size()) < sampling.max_new_tokens) {
      logits = model.Decode(ctx, arena, token, run, &cache);
    }
  }
  return tokens;
}

}  // namespace sala::model
