// Attention cases on the device: an AttentionCase with bf16 values, its tensors on the device as
// the model has them (q, k, v and their gradients columns of one matrix each), and bounds of the
// results.
//
// Bounds. Roundings to bf16 (2^-9 relative each) are the large ones, and there are few:
//   out     P as an operand, and the result:  2^-9 (sum P |v| + |out|)
//   dv      the same with dO:                 2^-9 (sum P |dO| + |dv|)
//   dq, dk  dS as an operand, the result, and delta, which is made of the rounded out:
//           2^-9 (scale sum |dS| |k| + |dq|) + scale sum P |k| sum_c |dO_c| (error of out_c)
// float32 adds what AttentionBounds has, twice: tensor cores may cut instead of round. These bounds
// hold for every element. Errors are independent, so their root mean square over a result must be
// much smaller: at most 4e-3 of that of the result (of gradients in documents of 15 tokens or more:
// with one or two keys dP - delta is the difference of nearly equal numbers).
#pragma once

#include <functional>
#include <vector>

#include "tests/kernels/attention/attention_case.h"
#include "tests/kernels/common/cuda_test.h"

namespace sala::kernels {

constexpr double kAcceptance = 4e-3;

// Inputs are rounded to bf16 in place.
inline void RoundInputs(AttentionCase& c) {
  for (Matrix* x : {&c.q, &c.k, &c.v, &c.dout}) {
    for (int64_t t = 0; t < x->rows(); ++t) {
      for (int64_t i = 0; i < x->columns(); ++i) {
        x->at(t, i) = static_cast<float>(BF16(x->at(t, i)));
      }
    }
  }
}

// [q | k | v], or the gradients.
inline Matrix Joined(const Matrix& q, const Matrix& k, const Matrix& v) {
  Matrix m(q.rows(), q.columns() + k.columns() + v.columns());
  for (int64_t t = 0; t < m.rows(); ++t) {
    int64_t column = 0;
    for (const Matrix* x : {&q, &k, &v}) {
      for (int64_t i = 0; i < x->columns(); ++i) m.at(t, column++) = x->at(t, i);
    }
  }
  return m;
}

class DeviceAttention {
 public:
  explicit DeviceAttention(const AttentionCase& c)
      : heads_(c.heads),
        qkv_(DType::kBF16, Joined(c.q, c.k, c.v), 8),
        dout_(DType::kBF16, c.dout, 16),
        out_(DType::kBF16, c.t, c.q.columns(), 8),
        lse_(DType::kF32, c.t, c.heads.query),
        dqkv_(DType::kBF16, c.t, qkv_.columns(), 24) {}

  Tensor q() const { return Wide(qkv_, 0); }
  Tensor k() const { return Narrow(qkv_, 0); }
  Tensor v() const { return Narrow(qkv_, 1); }
  Tensor dout() const { return Wide(dout_, 0); }
  Tensor out() const { return Wide(out_, 0); }
  Tensor lse() const { return lse_.tensor(); }
  Tensor dq() const { return Wide(dqkv_, 0); }
  Tensor dk() const { return Narrow(dqkv_, 0); }
  Tensor dv() const { return Narrow(dqkv_, 1); }

  void Download(AttentionCase& c) const {
    c.out = out_.Download();
    c.lse = lse_.Download();
    const Matrix all = dqkv_.Download();
    const int64_t wide = heads_.query * heads_.d;
    const int64_t narrow = heads_.kv * heads_.d;
    c.dq = Columns(all, 0, wide);
    c.dk = Columns(all, wide, narrow);
    c.dv = Columns(all, wide + narrow, narrow);
    EXPECT_TRUE(out_.GapsUntouched() && lse_.GapsUntouched() && dqkv_.GapsUntouched());
  }

 private:
  Tensor Wide(const DeviceMatrix& x, int64_t column) const {
    return x.tensor()
        .Columns(column, column + heads_.query * heads_.d)
        .AsHeads(heads_.query, heads_.d);
  }
  Tensor Narrow(const DeviceMatrix& x, int64_t which) const {
    const int64_t width = heads_.kv * heads_.d;
    const int64_t column = heads_.query * heads_.d + which * width;
    return x.tensor().Columns(column, column + width).AsHeads(heads_.kv, heads_.d);
  }
  static Matrix Columns(const Matrix& x, int64_t first, int64_t count) {
    Matrix m(x.rows(), count);
    for (int64_t t = 0; t < m.rows(); ++t) {
      for (int64_t i = 0; i < count; ++i) m.at(t, i) = x.at(t, first + i);
    }
    return m;
  }

  HeadCounts heads_;
  DeviceMatrix qkv_, dout_, out_, lse_, dqkv_;
};

// Root mean square of the error is at most kAcceptance of that of the result.
inline void ExpectAccepted(const Matrix& found, const std::vector<double>& expected,
                           const char* name) {
  const auto values = found.values();
  ASSERT_EQ(values.size(), expected.size());
  double error = 0;
  double size = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    error += (values[i] - expected[i]) * (values[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  EXPECT_LE(std::sqrt(error), kAcceptance * std::sqrt(size)) << name;
}

// One document: results in `c` against the reference with the same keys per query.
inline void ExpectMatchesReferenceInBf16(
    const AttentionCase& c, const reference::Attends& attends = reference::AttendsAll) {
  constexpr double kRound = 1.01 * kBf16Round;
  const reference::AttentionShape shape = c.Shape();
  const auto d = static_cast<size_t>(shape.d);
  const auto q = c.q.values();
  const auto k = c.k.values();
  const auto v = c.v.values();
  const auto dout = c.dout.values();
  std::vector<double> v_size(v);
  for (double& x : v_size) x = std::abs(x);
  const AttentionBounds bounds(shape, q, k, v);
  const auto forward = reference::AttentionForward(shape, q, k, v, attends);
  const auto size = reference::AttentionForward(shape, q, k, v_size, attends);
  std::vector<double> out_bound(forward.out.size());
  for (size_t i = 0; i < out_bound.size(); ++i) {
    out_bound[i] = kRound * (size.out[i] + std::abs(forward.out[i])) + 2 * bounds.Out();
  }
  ExpectClose(c.out, forward.out, [&](size_t i) { return out_bound[i]; });
  ExpectClose(c.lse, forward.lse, [&](size_t i) { return 2 * bounds.Lse(forward.lse[i]); });
  ExpectAccepted(c.out, forward.out, "out");

  reference::AttentionGradients grad = {
      std::vector<double>(q.size()), std::vector<double>(k.size()), std::vector<double>(v.size())};
  reference::AttentionGradients limit = grad;
  // P and dS in float32: twice AttentionBounds' factor of gradients, |lse| below 30.
  const double float_error =
      8 * bounds.OutFactor() + (240 + 4 * static_cast<double>(d)) * kF32Round;
  double v_max = 0;
  for (double x : v_size) v_max = std::max(v_max, x);
  for (int64_t t = 0; t < shape.n; ++t) {
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      const int64_t g = h / shape.group();
      const size_t row = shape.Query(t, h);
      const double delta = reference::Dot(&dout[row], &forward.out[row], shape.d);
      double delta_error = 0;
      double dout_sum = 0;
      for (size_t i = 0; i < d; ++i) {
        delta_error += std::abs(dout[row + i]) * out_bound[row + i];
        dout_sum += std::abs(dout[row + i]);
      }
      for (int64_t j = 0; j <= t; ++j) {
        if (!attends(t, g, j)) continue;
        const size_t key = shape.Key(j, g);
        const double p = std::exp(shape.scale * reference::Dot(&q[row], &k[key], shape.d) -
                                  forward.lse[static_cast<size_t>(t * shape.query_heads + h)]);
        const double ds = p * (reference::Dot(&dout[row], &v[key], shape.d) - delta);
        const double ds_error = shape.scale * (kRound * std::abs(ds) + p * delta_error +
                                               float_error * p * 2 * dout_sum * v_max);
        for (size_t i = 0; i < d; ++i) {
          grad.dq[row + i] += shape.scale * ds * k[key + i];
          grad.dk[key + i] += shape.scale * ds * q[row + i];
          grad.dv[key + i] += p * dout[row + i];
          limit.dq[row + i] += ds_error * std::abs(k[key + i]);
          limit.dk[key + i] += ds_error * std::abs(q[row + i]);
          limit.dv[key + i] += (kRound + float_error) * p * std::abs(dout[row + i]);
        }
      }
    }
  }
  const auto expect = [&shape](const Matrix& found, const std::vector<double>& expected,
                               const std::vector<double>& bound, const char* name) {
    ExpectClose(found, expected,
                [&](size_t i) { return bound[i] + kRound * std::abs(expected[i]) + 1e-38; });
    if (shape.n >= 15) ExpectAccepted(found, expected, name);
  };
  expect(c.dq, grad.dq, limit.dq, "dq");
  expect(c.dk, grad.dk, limit.dk, "dk");
  expect(c.dv, grad.dv, limit.dv, "dv");
}

}  // namespace sala::kernels
