// Comparisons with the float64 reference: its gradients against complex steps of its forward pass,
// and the fast path against it element by element.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>
#include <functional>
#include <string>
#include <vector>

#include "core/rng.h"
#include "model/loss.h"
#include "model/reference.h"
#include "model/reference_model.h"
#include "tests/model/cases.h"

namespace sala::model::testing {

using Complex = std::complex<double>;
using ComplexModel = ReferenceModel<Complex>;

// kRelative is the bound of a chain of float32 roundings, 2^-24 each; a chain of float64 ones has
// 2^-53 each.
constexpr double kDoubleRelative = kRelative * 0x1p-29;

inline double Largest(const double* x, int64_t n) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
  return largest;
}

// The gradient of a score is P (dP - D), of two terms as large as those that give the gradient of
// the values: with few keys they cancel, with one key to nothing, but for rounding. For the tensors
// behind the scores, the largest element of the values' gradient; else 0.
inline double ScoreTerms(const ParameterStore& store, const std::vector<double>& gradients,
                         const ParameterSpec& spec) {
  const size_t mixer = spec.name.find(".self_attn.");
  if (mixer == std::string::npos) return 0;
  const std::string tensor = spec.name.substr(mixer + 11);
  if (tensor[0] != 'q' && tensor[0] != 'k') return 0;
  const ParameterSpec& values = store.Spec(spec.name.substr(0, mixer) + ".self_attn.v_proj.weight");
  return Largest(gradients.data() + values.offset, values.numel);
}

// The gradient of every tensor of `store` along one random direction, against the derivative by a
// complex step (exact: no difference is formed) of `loss`.
inline void ExpectComplexStep(const std::string& name, const ParameterStore& store,
                              const std::vector<double>& gradients,
                              const std::function<Complex(const std::vector<Complex>&)>& loss) {
  ASSERT_EQ(gradients.size(), static_cast<size_t>(store.size()));
  const std::vector<Complex> values(store.data(), store.data() + store.size());
  for (const ParameterSpec& spec : store.specs()) {
    PhiloxStream rng("v1|7|reference_test||0|direction|" + spec.name);
    std::vector<Complex> point = values;
    constexpr double kStep = 1e-30;
    double along = 0;
    double absolute = 0;  // the sum of the products' sizes: what their rounding is relative to
    const double terms = ScoreTerms(store, gradients, spec);
    double cancelled = 0;  // the same of terms that cancel in every element
    for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i) {
      const auto at = static_cast<size_t>(i);
      const double direction = rng.NextNormal();
      point[at] += Complex(0, kStep * direction);
      along += direction * gradients[at];
      absolute += std::abs(direction * gradients[at]);
      cancelled += std::abs(direction) * terms;
    }
    EXPECT_GT(absolute, 0) << name << ": no gradient reached " << spec.name;
    EXPECT_NEAR(along, loss(point).imag() / kStep, kDoubleRelative * std::max(absolute, cancelled))
        << name << ": " << spec.name;
  }
}

// Elements of a tensor share their rounding: each is a sum over the tokens of products that are as
// large as those of the tensor's largest element, and an element may be small by cancellation
// alone. So the bound is relative to the largest one, or to `terms` where all of them cancel.
inline void ExpectElements(const std::string& what, const float* found, const double* expected,
                           int64_t n, double terms = 0) {
  const double largest = std::max(terms, Largest(expected, n));
  for (int64_t i = 0; i < n; ++i) {
    ASSERT_NEAR(found[i], expected[i], kRelative * largest) << what << ", element " << i;
  }
}

// A block score is a sum of at most 4 exponentials of products of 8 terms below 30: relative errors
// of (8 + 1) * 30 * 2^-24 and a few units more. Selections with more room than twice that agree.
constexpr double kSafeMargin = 2 * (9 * 30 + 10) * 0x1p-24;

// Loss, hidden states, logits and the gradient of 0.5 * loss of the fast path against the
// reference, whose result is returned.
inline ReferenceResult ExpectFastPathAgrees(const Context& ctx, Arena& arena,
                                            const std::string& what, const ModelConfig& config,
                                            ParameterStore store, const RunOptions& options,
                                            const Batch& batch) {
  ReferenceResult expected = ReferenceCrossEntropy(config, store, batch, options, 0.5);
  const Model model(config, store);
  ParameterStore gradients(store.specs());
  const auto result =
      CrossEntropyStep(ctx, arena, model, batch, options, 0.5F, BindTensors(config, gradients));
  EXPECT_NEAR(result.loss_sum, expected.loss_sum, kRelative * expected.loss_sum) << what;
  EXPECT_EQ(result.targets, expected.count) << what;
  for (const ParameterSpec& spec : store.specs()) {
    ExpectElements(what + ": " + spec.name, gradients.data() + spec.offset,
                   expected.gradients.data() + spec.offset, spec.numel,
                   ScoreTerms(store, expected.gradients, spec));
  }
  const ArenaScope scope(arena);
  const Tensor hidden = model.ForwardOnly(ctx, arena, batch, options);
  ExpectElements(what + ": hidden", hidden.Data<float>(), expected.hidden.data(), hidden.numel());
  const std::vector<float> logits = model.Logits(ctx, hidden);
  ExpectElements(what + ": logits", logits.data(), expected.logits.data(),
                 static_cast<int64_t>(logits.size()));
  return expected;
}

}  // namespace sala::model::testing
