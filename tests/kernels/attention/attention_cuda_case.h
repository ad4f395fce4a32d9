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

// `Rows`: DeviceMatrix or FarMatrix.
template <typename Rows>
class DeviceAttentionOf {
 public:
  explicit DeviceAttentionOf(const AttentionCase& c)
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
  Tensor Wide(const Rows& x, int64_t column) const {
    return x.tensor()
        .Columns(column, column + heads_.query * heads_.d)
        .AsHeads(heads_.query, heads_.d);
  }
  Tensor Narrow(const Rows& x, int64_t which) const {
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
  Rows qkv_, dout_, out_, lse_, dqkv_;
};
using DeviceAttention = DeviceAttentionOf<DeviceMatrix>;

// The most scratch that `run(ctx, memory)` takes on a dry device; `memory` is an address there.
inline size_t DryScratch(size_t bytes, const std::function<void(const Context&, void*)>& run) {
  auto opened = OpenCudaDevice({.host = "test", .dry = true});
  EXPECT_TRUE(opened.ok());
  const std::unique_ptr<Device> device = std::move(opened).value();
  ThreadPool pool(1);
  void* memory = device->Allocate(bytes);
  size_t peak = 0;
  {
    Arena scratch(size_t{1} << 20, device.get());
    run({DeviceKind::kCuda, &pool, &scratch, device.get()}, memory);
    peak = scratch.peak_bytes();
  }
  device->Free(memory);
  return peak;
}

// The bounds of one document, a row or a key at a time. `lse` and delta come from the results when
// those are given (long documents: they are inputs of the backward pass, and checked by sample).
class Bf16Reference {
 public:
  static constexpr double kRound = 1.01 * kBf16Round;
  struct Values {
    std::vector<double> expected, bound;
    explicit Values(int64_t d = 0)
        : expected(static_cast<size_t>(d)), bound(static_cast<size_t>(d)) {}
  };

  Bf16Reference(const AttentionCase& c, const reference::Attends& attends, bool statistics_of_case)
      : shape_(c.Shape()),
        attends_(attends),
        q_(c.q.values()),
        k_(c.k.values()),
        v_(c.v.values()),
        v_size_(v_),
        dout_(c.dout.values()),
        bounds_(shape_, q_, k_, v_) {
    for (double& x : v_size_) {
      x = std::abs(x);
      v_max_ = std::max(v_max_, x);
    }
    const auto rows = static_cast<size_t>(shape_.n * shape_.query_heads);
    lse_.resize(rows);
    delta_.resize(rows);
    delta_error_.resize(rows);
    // Twice AttentionBounds' factor of gradients, |lse| below 30.
    float_error_ = 8 * bounds_.OutFactor() + (240 + 4 * static_cast<double>(shape_.d)) * kF32Round;
    const auto outs = statistics_of_case ? c.out.values() : std::vector<double>();
    for (int64_t t = 0; t < shape_.n; ++t) {
      for (int64_t h = 0; h < shape_.query_heads; ++h) {
        const size_t i = Row(t, h);
        const double* grad = &dout_[shape_.Query(t, h)];
        if (statistics_of_case) {
          lse_[i] = c.lse.at(t, h);
          delta_[i] = reference::Dot(grad, &outs[shape_.Query(t, h)], shape_.d);
          continue;
        }
        const Values out = Out(t, h, &lse_[i]);
        delta_[i] = reference::Dot(grad, out.expected.data(), shape_.d);
        for (size_t x = 0; x < out.bound.size(); ++x) {
          delta_error_[i] += std::abs(grad[x]) * out.bound[x];
        }
      }
    }
  }

  const reference::AttentionShape& shape() const { return shape_; }
  double Lse(int64_t t, int64_t h) const { return lse_[Row(t, h)]; }
  double LseBound(double lse) const { return 2 * bounds_.Lse(lse); }

  Values Out(int64_t t, int64_t h, double* lse) const {
    Values out(shape_.d);
    std::vector<double> size(out.bound.size());
    *lse = reference::AttendRow(shape_, q_, k_, v_, attends_, t, h, out.expected.data());
    reference::AttendRow(shape_, q_, k_, v_size_, attends_, t, h, size.data());
    for (size_t i = 0; i < size.size(); ++i) {
      out.bound[i] = kRound * (size[i] + std::abs(out.expected[i])) + 2 * bounds_.Out();
    }
    return out;
  }

  Values QueryGradient(int64_t t, int64_t h) const {
    Values dq(shape_.d);
    const int64_t g = h / shape_.group();
    for (int64_t j = 0; j <= t; ++j) {
      if (attends_(t, g, j)) Add(Pair(t, h, j), &k_[shape_.Key(j, g)], dq);
    }
    Close(dq);
    return dq;
  }

  void KeyGradients(int64_t j, int64_t g, Values* dk, Values* dv) const {
    *dk = *dv = Values(shape_.d);
    for (int64_t t = j; t < shape_.n; ++t) {
      if (!attends_(t, g, j)) continue;
      for (int64_t h = g * shape_.group(); h < (g + 1) * shape_.group(); ++h) {
        const PairTerms pair = Pair(t, h, j);
        Add(pair, &q_[shape_.Query(t, h)], *dk);
        const double* grad = &dout_[shape_.Query(t, h)];
        for (size_t i = 0; i < dv->expected.size(); ++i) {
          dv->expected[i] += pair.p * grad[i];
          dv->bound[i] += (kRound + float_error_) * pair.p * std::abs(grad[i]);
        }
      }
    }
    Close(*dk);
    Close(*dv);
  }

 private:
  struct PairTerms {
    double p, ds, ds_error;  // the last two with scale
  };
  size_t Row(int64_t t, int64_t h) const { return static_cast<size_t>(t * shape_.query_heads + h); }
  PairTerms Pair(int64_t t, int64_t h, int64_t j) const {
    const int64_t g = h / shape_.group();
    const double* query = &q_[shape_.Query(t, h)];
    const double* grad = &dout_[shape_.Query(t, h)];
    double grad_sum = 0;
    for (int64_t i = 0; i < shape_.d; ++i) grad_sum += std::abs(grad[i]);
    const size_t key = shape_.Key(j, g);
    PairTerms pair = {};
    pair.p = std::exp(shape_.scale * reference::Dot(query, &k_[key], shape_.d) - lse_[Row(t, h)]);
    const double ds = pair.p * (reference::Dot(grad, &v_[key], shape_.d) - delta_[Row(t, h)]);
    pair.ds = shape_.scale * ds;
    pair.ds_error =
        shape_.scale * (kRound * std::abs(ds) +
                        pair.p * (delta_error_[Row(t, h)] + float_error_ * 2 * grad_sum * v_max_));
    return pair;
  }
  static void Add(const PairTerms& pair, const double* factor, Values& sum) {
    for (size_t i = 0; i < sum.expected.size(); ++i) {
      sum.expected[i] += pair.ds * factor[i];
      sum.bound[i] += pair.ds_error * std::abs(factor[i]);
    }
  }
  static void Close(Values& sum) {
    for (size_t i = 0; i < sum.expected.size(); ++i) {
      sum.bound[i] += kRound * std::abs(sum.expected[i]) + 1e-38;
    }
  }

  const reference::AttentionShape shape_;
  const reference::Attends& attends_;
  const std::vector<double> q_, k_, v_;
  std::vector<double> v_size_;
  const std::vector<double> dout_;
  const AttentionBounds bounds_;
  double v_max_ = 0;
  double float_error_ = 0;
  std::vector<double> lse_, delta_, delta_error_;
};

// Compares parts of a result and keeps the sums of squares.
class Comparison {
 public:
  explicit Comparison(const char* name) : name_(name) {}

  void Expect(const Matrix& found, int64_t row, int64_t column,
              const Bf16Reference::Values& values) {
    for (size_t i = 0; i < values.expected.size(); ++i) {
      const double value = found.at(row, column + static_cast<int64_t>(i));
      const double error = value - values.expected[i];
      ASSERT_TRUE(std::abs(error) <= values.bound[i])
          << name_ << " of token " << row << ", element " << i << ": found " << value
          << ", expected " << values.expected[i] << ", allowed " << values.bound[i];
      error_ += error * error;
      size_ += values.expected[i] * values.expected[i];
    }
  }
  void ExpectAccepted() const {
    EXPECT_LE(std::sqrt(error_), kAcceptance * std::sqrt(size_)) << name_;
  }

 private:
  const char* name_;
  double error_ = 0;
  double size_ = 0;
};

// One document: results of the given tokens (out, lse, dq) and keys (dk, dv).
inline void ExpectRowsMatch(const AttentionCase& c, const Bf16Reference& expected,
                            const std::vector<int64_t>& tokens, const std::vector<int64_t>& keys) {
  const reference::AttentionShape& shape = expected.shape();
  Comparison out("out"), dq("dq"), dk("dk"), dv("dv");
  for (const int64_t t : tokens) {
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      double lse = 0;
      out.Expect(c.out, t, h * shape.d, expected.Out(t, h, &lse));
      ASSERT_NEAR(c.lse.at(t, h), lse, expected.LseBound(lse)) << "token " << t;
      dq.Expect(c.dq, t, h * shape.d, expected.QueryGradient(t, h));
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  for (const int64_t j : keys) {
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      Bf16Reference::Values dk_values, dv_values;
      expected.KeyGradients(j, g, &dk_values, &dv_values);
      dk.Expect(c.dk, j, g * shape.d, dk_values);
      dv.Expect(c.dv, j, g * shape.d, dv_values);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
  out.ExpectAccepted();
  dv.ExpectAccepted();
  if (shape.n >= 15) {
    dq.ExpectAccepted();
    dk.ExpectAccepted();
  }
}

inline void ExpectMatchesReferenceInBf16(
    const AttentionCase& c, const reference::Attends& attends = reference::AttendsAll) {
  const Bf16Reference expected(c, attends, /*statistics_of_case=*/false);
  std::vector<int64_t> all(static_cast<size_t>(c.t));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  ExpectRowsMatch(c, expected, all, all);
}

// With lse and delta of the case, for long documents. delta of the case has the error of the out it
// is made of, which is the kernel's too.
inline void ExpectSampleMatchesReference(const AttentionCase& c, const reference::Attends& attends,
                                         const std::vector<int64_t>& tokens,
                                         const std::vector<int64_t>& keys) {
  const Bf16Reference expected(c, attends, /*statistics_of_case=*/true);
  ExpectRowsMatch(c, expected, tokens, keys);
}

}  // namespace sala::kernels
