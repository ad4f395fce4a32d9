// What the kernel tests share: a context, random and poisoned tensors with strides, comparison with
// a bound per element.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/context.h"

namespace sala::kernels {

// Half a unit in the last place of float32, relative: the error of one rounding.
constexpr double kF32Round = 0x1p-24;

class KernelTest {
 public:
  explicit KernelTest(int threads = 1) : pool_(threads) {}
  Context ctx() { return {DeviceKind::kCpu, &pool_, &arena_}; }
  const Arena& arena() const { return arena_; }

 private:
  ThreadPool pool_;
  Arena arena_{size_t{1} << 20};
};

// A [rows, columns] float matrix whose rows lie `columns + gap` apart; the gaps hold NaN and must
// stay untouched.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, int64_t gap = 0)
      : rows_(rows),
        columns_(columns),
        stride_(columns + gap),
        data_(static_cast<size_t>(rows * stride_ + 1), std::numeric_limits<float>::quiet_NaN()) {}

  static Matrix Random(int64_t rows, int64_t columns, std::mt19937& rng, int64_t gap = 0,
                       float scale = 1.0F) {
    Matrix m(rows, columns, gap);
    std::normal_distribution<float> normal(0.0F, scale);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) m.at(r, c) = normal(rng);
    }
    return m;
  }
  static Matrix Filled(int64_t rows, int64_t columns, float value, int64_t gap = 0) {
    Matrix m(rows, columns, gap);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) m.at(r, c) = value;
    }
    return m;
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  float& at(int64_t r, int64_t c) { return data_[static_cast<size_t>(r * stride_ + c)]; }
  float at(int64_t r, int64_t c) const { return data_[static_cast<size_t>(r * stride_ + c)]; }

  sala::Tensor tensor() {
    return sala::Tensor(data_.data(), {rows_, stride_}).Columns(0, columns_);
  }
  // One row as a vector.
  sala::Tensor vector() { return sala::Tensor(data_.data(), {columns_}); }

  // The elements without the gaps, as doubles for the reference.
  template <typename T = double>
  std::vector<T> values() const {
    std::vector<T> out;
    out.reserve(static_cast<size_t>(rows_ * columns_));
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) out.push_back(static_cast<T>(at(r, c)));
    }
    return out;
  }

  bool SameBits(const Matrix& other) const {
    const auto a = values<float>();
    const auto b = other.values<float>();
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }
  bool GapsUntouched() const {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = columns_; c < stride_; ++c) {
        if (!std::isnan(at(r, c))) return false;
      }
    }
    return std::isnan(data_.back());
  }

 private:
  int64_t rows_, columns_, stride_;
  std::vector<float> data_;
};

// |found - expected| <= bound(i) for every element; NaN fails.
template <typename Bound>
void ExpectClose(const Matrix& found, const std::vector<double>& expected, const Bound& bound) {
  const auto values = found.values();
  ASSERT_EQ(values.size(), expected.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const double limit = bound(i);
    ASSERT_TRUE(std::abs(values[i] - expected[i]) <= limit)
        << "element " << i << ": found " << values[i] << ", expected " << expected[i]
        << ", allowed " << limit;
  }
}

// The token counts every row-wise operation is tried with.
inline const std::vector<int64_t>& EdgeSizes() {
  static const std::vector<int64_t> sizes = {0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129};
  return sizes;
}

// Derivative of the real part of f at x in each coordinate by complex step: Im f(x + i h e_j) / h.
// No difference is taken, so h can be far below rounding and the result is exact to double
// precision. f must be analytic. Source: Squire and Trapp, "Using complex variables to estimate
// derivatives of real functions", SIAM Review 40 (1998).
template <typename F>
std::vector<double> ComplexStep(const std::vector<double>& x, const F& f) {
  constexpr double kStep = 1e-30;
  std::vector<std::complex<double>> z(x.begin(), x.end());
  std::vector<double> gradient;
  gradient.reserve(x.size());
  for (size_t j = 0; j < x.size(); ++j) {
    z[j] = {x[j], kStep};
    gradient.push_back(f(z).imag() / kStep);
    z[j] = x[j];
  }
  return gradient;
}

// Two double computations of one gradient: relative to the largest element, 2^-53 times a few
// hundred operations.
inline void ExpectSameGradient(const std::vector<double>& found,
                               const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  double largest = 0;
  for (double e : expected) largest = std::max(largest, std::abs(e));
  for (size_t i = 0; i < found.size(); ++i) {
    ASSERT_NEAR(found[i], expected[i], 1e-12 * largest) << "element " << i;
  }
}

}  // namespace sala::kernels
