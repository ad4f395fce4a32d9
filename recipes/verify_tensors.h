// What the checks of `sala verify` that compute in this process share: what they compute on, and
// how tensors are compared and named.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "core/arena.h"
#include "core/context.h"
#include "model/model.h"
#include "model/parameters.h"

namespace sala::recipes {

// "model.layers.3.mlp.up_proj.weight (layer 3)"
std::string Named(const std::string& tensor);

// The loss is divided by its count as in a step, so that gradients have their usual size.
double TargetScale(const model::Batch& batch);

// What the passes compute on: a thread, work space, an arena for results; of a device where one is
// given.
struct Host {
  explicit Host(Device* device = nullptr);
  ThreadPool pool{1};
  Arena arena, scratch;
  Context ctx;
};

// The element that differs most, as a part of the largest expected one of its tensor.
struct Worst {
  double difference = 0;  // infinity: not finite, or where zero was expected
  std::string tensor;
  int64_t element = 0;
  double found = 0, expected = 0;

  void Take(const Worst& other) {
    if (!(other.difference <= difference)) *this = other;
  }
  std::string Text() const;
};

// Of one tensor of two buffers with the layout of `spec`.
template <typename Expected>
Worst CompareTensor(const model::ParameterSpec& spec, const float* found,
                    const Expected* expected) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double largest = 0;
  for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i)
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
  Worst worst;
  worst.tensor = spec.name;
  for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i) {
    const auto want = static_cast<double>(expected[i]);
    const auto have = static_cast<double>(found[i]);
    double difference = have == want ? 0 : std::abs(have - want) / largest;
    if (!std::isfinite(difference)) difference = kInfinity;
    if (difference > worst.difference || i == spec.offset)
      worst = {difference, spec.name, i - spec.offset, have, want};
  }
  return worst;
}

}  // namespace sala::recipes
