// Softmax attention of one document in plain loops, over any set of keys per query: the standard
// for the dense and the sparse kernels. Number is double, or std::complex<double> to take
// derivatives by complex step; comparisons look at the real part.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <functional>
#include <vector>

namespace sala::kernels::reference {

inline double RealPart(double x) { return x; }
inline double RealPart(const std::complex<double>& x) { return x.real(); }

// q [n, N, D], k and v [n, K, D], contiguous.
struct AttentionShape {
  int64_t n = 0;
  int64_t query_heads = 1;
  int64_t kv_heads = 1;
  int64_t d = 1;
  double scale = 1.0;

  int64_t group() const { return query_heads / kv_heads; }
  size_t Query(int64_t t, int64_t h) const {
    return static_cast<size_t>((t * query_heads + h) * d);
  }
  size_t Key(int64_t t, int64_t g) const { return static_cast<size_t>((t * kv_heads + g) * d); }
};

// Whether query t may see key j <= t under key/value head g.
using Attends = std::function<bool(int64_t t, int64_t g, int64_t j)>;
inline bool AttendsAll(int64_t /*t*/, int64_t /*g*/, int64_t /*j*/) { return true; }

template <typename Number>
Number Dot(const Number* a, const Number* b, int64_t d) {
  Number sum = 0;
  for (int64_t c = 0; c < d; ++c) sum += a[c] * b[c];
  return sum;
}

// One query head of one token: out [D]; returns the log of the sum of exponentials.
template <typename Number>
Number AttendRow(const AttentionShape& shape, const std::vector<Number>& q,
                 const std::vector<Number>& k, const std::vector<Number>& v, const Attends& attends,
                 int64_t t, int64_t h, Number* out) {
  const int64_t g = h / shape.group();
  std::vector<int64_t> keys;
  std::vector<Number> scores;
  double largest = -INFINITY;
  for (int64_t j = 0; j <= t; ++j) {
    if (!attends(t, g, j)) continue;
    keys.push_back(j);
    scores.push_back(shape.scale *
                     Dot(q.data() + shape.Query(t, h), k.data() + shape.Key(j, g), shape.d));
    largest = std::max(largest, RealPart(scores.back()));
  }
  Number sum = 0;
  for (int64_t c = 0; c < shape.d; ++c) out[c] = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const Number p = std::exp(scores[i] - largest);
    sum += p;
    for (int64_t c = 0; c < shape.d; ++c) {
      out[c] += p * v[shape.Key(keys[i], g) + static_cast<size_t>(c)];
    }
  }
  for (int64_t c = 0; c < shape.d; ++c) out[c] /= sum;
  return std::log(sum) + largest;
}

template <typename Number>
struct AttentionResult {
  std::vector<Number> out;  // [n, N, D]
  std::vector<Number> lse;  // [n, N]
};

template <typename Number>
AttentionResult<Number> AttentionForward(const AttentionShape& shape, const std::vector<Number>& q,
                                         const std::vector<Number>& k, const std::vector<Number>& v,
                                         const Attends& attends = AttendsAll) {
  AttentionResult<Number> result;
  result.out.resize(q.size());
  for (int64_t t = 0; t < shape.n; ++t) {
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      result.lse.push_back(
          AttendRow(shape, q, k, v, attends, t, h, result.out.data() + shape.Query(t, h)));
    }
  }
  return result;
}

struct AttentionGradients {
  std::vector<double> dq, dk, dv;
};

// P = exp(scale q.k - lse), dP = do.v, D = do.o, dS = P (dP - D); dq = scale dS k, dk = scale dS q,
// dv = P do.
inline AttentionGradients AttentionBackward(const AttentionShape& shape,
                                            const std::vector<double>& q,
                                            const std::vector<double>& k,
                                            const std::vector<double>& v,
                                            const std::vector<double>& dout,
                                            const Attends& attends = AttendsAll) {
  const AttentionResult<double> forward = AttentionForward(shape, q, k, v, attends);
  AttentionGradients grad = {std::vector<double>(q.size()), std::vector<double>(k.size()),
                             std::vector<double>(v.size())};
  for (int64_t t = 0; t < shape.n; ++t) {
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      const int64_t g = h / shape.group();
      const size_t row = shape.Query(t, h);
      const double delta = Dot(dout.data() + row, forward.out.data() + row, shape.d);
      for (int64_t j = 0; j <= t; ++j) {
        if (!attends(t, g, j)) continue;
        const size_t key = shape.Key(j, g);
        const double score = shape.scale * Dot(q.data() + row, k.data() + key, shape.d);
        const double p =
            std::exp(score - forward.lse[static_cast<size_t>(t * shape.query_heads + h)]);
        const double ds = p * (Dot(dout.data() + row, v.data() + key, shape.d) - delta);
        for (size_t c = 0; c < static_cast<size_t>(shape.d); ++c) {
          grad.dq[row + c] += shape.scale * ds * k[key + c];
          grad.dk[key + c] += shape.scale * ds * q[row + c];
          grad.dv[key + c] += p * dout[row + c];
        }
      }
    }
  }
  return grad;
}

}  // namespace sala::kernels::reference
