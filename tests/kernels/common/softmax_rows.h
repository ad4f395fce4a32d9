// What the tests of the softmax losses on a GPU share: error bounds of a row's sums, and the
// gradient of an output head with a bound per element.
#pragma once

#include "kernels/cross_entropy/reference.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {

// Largest difference of two logits of one row.
inline double Spread(int64_t vocabulary, const std::vector<double>& logits) {
  double largest = 0;
  for (size_t row = 0; row < logits.size(); row += static_cast<size_t>(vocabulary)) {
    const auto begin = logits.begin() + static_cast<int64_t>(row);
    const auto [low, high] = std::minmax_element(begin, begin + vocabulary);
    largest = std::max(largest, *high - *low);
  }
  return largest;
}

// Relative error of a sum over a row of exp(x - largest), x at most `spread` below: __expf is off
// by 2 + 1.2 |x| units of 2^-23 (CUDA's programming guide); a thread adds 8 elements in each of its
// steps of 4096 and scales its sum for a new maximum at most once in each, by another __expf, and
// once at the end; x - largest has one rounding, of `spread`.
inline double RowSumError(int64_t vocabulary, double spread) {
  const double steps = std::ceil(static_cast<double>(vocabulary) / 4096);
  const double exponential = 2 * (2 + 1.2 * spread) * kF32Round + spread * kF32Round;
  return (steps + 2) * exponential + (9 * steps + 4) * kF32Round;
}

// What a gradient `dlogits` of scale * hidden W^T gives. `size` [tokens, vocabulary] are the
// magnitudes that errors of the gradient are relative to.
class HeadGradient {
 public:
  HeadGradient(const Matrix& hidden, const Matrix& weight, double scale,
               const std::vector<double>& dlogits, const std::vector<double>& size,
               double old_dweight)
      : tokens_(hidden.rows()), vocabulary_(weight.rows()), old_dweight_(old_dweight) {
    const auto h = hidden.values();
    const auto w = weight.values();
    dhidden_.resize(h.size());
    dhidden_size_.resize(h.size());
    dweight_.assign(w.size(), old_dweight);
    dweight_size_.assign(w.size(), std::abs(old_dweight));
    reference::HeadBackward(tokens_, hidden.columns(), vocabulary_, scale, dlogits.data(), h.data(),
                            w.data(), dhidden_.data(), dweight_.data());
    const auto absolute = [](std::vector<double> x) {
      for (double& v : x) v = std::abs(v);
      return x;
    };
    reference::HeadBackward(tokens_, hidden.columns(), vocabulary_, scale, size.data(),
                            absolute(h).data(), absolute(w).data(), dhidden_size_.data(),
                            dweight_size_.data());
  }

  // `error`: of an element of the gradient, relative to its size. The product adds one rounding for
  // each term (8 more: tensor cores, see gemm_cuda_test.cc); dhidden is rounded to bfloat16,
  // dweight after each chunk, of which there are at most as many as tokens, to float32.
  void ExpectHidden(const DeviceMatrix& found, double error) const {
    ExpectClose(found.Download(), dhidden_, [&](size_t i) {
      return (error + static_cast<double>(vocabulary_ + 8) * kF32Round) * dhidden_size_[i] +
             1.01 * kBf16Round * std::abs(dhidden_[i]);
    });
    EXPECT_TRUE(found.GapsUntouched());
  }
  void ExpectWeight(const DeviceMatrix& found, double error) const {
    ExpectClose(found.Download(), dweight_, [&](size_t i) {
      return (error + static_cast<double>(2 * tokens_ + 8) * kF32Round) * dweight_size_[i];
    });
    EXPECT_TRUE(found.GapsUntouched());
  }

  // The same of parts: dhidden as the sum over ranks, each of which has rounded its own to
  // bfloat16; dweight as their rows, one rank's behind the other's, and behind the last entry
  // padding that nobody has touched.
  void ExpectHiddenSum(const std::vector<const DeviceMatrix*>& parts, double error) const {
    std::vector<double> sums(dhidden_.size()), part_size(dhidden_.size());
    for (const DeviceMatrix* part : parts) {
      const auto values = part->Download().values();
      ASSERT_EQ(values.size(), sums.size());
      for (size_t i = 0; i < values.size(); ++i) {
        sums[i] += values[i];
        part_size[i] += std::abs(values[i]);
      }
      EXPECT_TRUE(part->GapsUntouched());
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      const double limit =
          (error + static_cast<double>(vocabulary_ + 8) * kF32Round) * dhidden_size_[i] +
          1.01 * kBf16Round * part_size[i];
      ASSERT_TRUE(std::abs(sums[i] - dhidden_[i]) <= limit)
          << "element " << i << ": found " << sums[i] << ", expected " << dhidden_[i]
          << ", allowed " << limit;
    }
  }
  void ExpectWeightRows(const std::vector<const DeviceMatrix*>& parts, double error) const {
    std::vector<double> rows;
    for (const DeviceMatrix* part : parts) {
      const auto values = part->Download().values();
      rows.insert(rows.end(), values.begin(), values.end());
      EXPECT_TRUE(part->GapsUntouched());
    }
    ASSERT_GE(rows.size(), dweight_.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const bool entry = i < dweight_.size();
      const double expected = entry ? dweight_[i] : old_dweight_;
      const double limit =
          entry ? (error + static_cast<double>(2 * tokens_ + 8) * kF32Round) * dweight_size_[i] : 0;
      ASSERT_TRUE(std::abs(rows[i] - expected) <= limit)
          << "element " << i << ": found " << rows[i] << ", expected " << expected << ", allowed "
          << limit;
    }
  }

 private:
  int64_t tokens_, vocabulary_;
  double old_dweight_;
  std::vector<double> dhidden_, dhidden_size_, dweight_, dweight_size_;
};

}  // namespace sala::kernels
