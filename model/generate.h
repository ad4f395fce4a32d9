// Text generation with a key/value cache and recurrent states: greedy, temperature, top-p.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/rng.h"
#include "model/model.h"

namespace sala::model {

struct SamplingOptions {
  double temperature = 0;  // 0: greedy, ties to the lowest id
  double top_p =
      1;  // nucleus: the smallest set of most likely tokens with at least this probability
  int64_t max_new_tokens = 128;
  int64_t seed = 0;
  std::vector<int32_t> stop_tokens;
};

// One token from the logits [V].
int32_t SampleToken(const std::vector<float>& logits, double temperature, double top_p,
                    PhiloxStream& rng);

// Continues the prompt; `on_token` is called for each new token (stop tokens excluded)
// and says whether to go on.
std::vector<int32_t> Generate(const Context& ctx, Arena& arena, const Model& model,
                              const std::vector<int32_t>& prompt, const RunOptions& run,
                              const SamplingOptions& sampling,
                              const std::function<bool(int32_t)>& on_token = nullptr);

}  // namespace sala::model
