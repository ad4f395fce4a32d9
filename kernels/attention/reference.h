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

// P = exp(scale q.k - lse), dP = do.v, D = do.o, dS = P (dP - D); dq = scale dS k, dk = scale dS q,
// dv = P do. One row at a time: a long document can be checked at some of its rows.
class AttentionBackwardRows {
 public:
  // Everything must outlive this.
  AttentionBackwardRows(const AttentionShape& shape, const std::vector<double>& q,
                        const std::vector<double>& k, const std::vector<double>& v,
                        const AttentionResult<double>& forward, const std::vector<double>& dout)
      : shape_(shape), q_(q), k_(k), v_(v), forward_(forward), dout_(dout) {}

  // Calls term(p, ds) for the query (t, h) and the key (j, h / group()).
  template <typename Term>
  void Pair(int64_t t, int64_t h, int64_t j, const Term& term) const {
    const size_t row = shape_.Query(t, h);
    const size_t key = shape_.Key(j, h / shape_.group());
    const double delta = Dot(dout_.data() + row, forward_.out.data() + row, shape_.d);
    const double score = shape_.scale * Dot(q_.data() + row, k_.data() + key, shape_.d);
    const double p =
        std::exp(score - forward_.lse[static_cast<size_t>(t * shape_.query_heads + h)]);
    term(p, p * (Dot(dout_.data() + row, v_.data() + key, shape_.d) - delta));
  }

  // dq [D] of one query head of one token.
  std::vector<double> Query(int64_t t, int64_t h, const Attends& attends) const {
    std::vector<double> dq(static_cast<size_t>(shape_.d));
    for (int64_t j = 0; j <= t; ++j) {
      if (!attends(t, h / shape_.group(), j)) continue;
      const double* key = k_.data() + shape_.Key(j, h / shape_.group());
      Pair(t, h, j, [&](double /*p*/, double ds) {
        for (size_t c = 0; c < dq.size(); ++c) dq[c] += shape_.scale * ds * key[c];
      });
    }
    return dq;
  }

  struct KeyGradients {
    std::vector<double> dk, dv;  // [D]
  };
  // Of one key/value head of one token in a document of n tokens: summed over the queries j .. n
  // - 1.
  KeyGradients Key(int64_t j, int64_t g, int64_t n, const Attends& attends) const {
    KeyGradients grad = {std::vector<double>(static_cast<size_t>(shape_.d)),
                         std::vector<double>(static_cast<size_t>(shape_.d))};
    for (int64_t t = j; t < n; ++t) {
      if (!attends(t, g, j)) continue;
      for (int64_t h = g * shape_.group(); h < (g + 1) * shape_.group(); ++h) {
        const size_t row = shape_.Query(t, h);
        Pair(t, h, j, [&](double p, double ds) {
          for (size_t c = 0; c < grad.dk.size(); ++c) {
            grad.dk[c] += shape_.scale * ds * q_[row + c];
            grad.dv[c] += p * dout_[row + c];
          }
        });
      }
    }
    return grad;
  }

 private:
  const AttentionShape& shape_;
  const std::vector<double>&q_, &k_, &v_;
  const AttentionResult<double>& forward_;
  const std::vector<double>& dout_;
};

struct AttentionGradients {
  std::vector<double> dq, dk, dv;
};

inline AttentionGradients AttentionBackward(const AttentionShape& shape,
                                            const std::vector<double>& q,
                                            const std::vector<double>& k,
                                            const std::vector<double>& v,
                                            const std::vector<double>& dout,
                                            const Attends& attends = AttendsAll) {
  const AttentionResult<double> forward = AttentionForward(shape, q, k, v, attends);
  const AttentionBackwardRows rows(shape, q, k, v, forward, dout);
  AttentionGradients grad;
  for (int64_t t = 0; t < shape.n; ++t) {
    for (int64_t h = 0; h < shape.query_heads; ++h) {
      const std::vector<double> dq = rows.Query(t, h, attends);
      grad.dq.insert(grad.dq.end(), dq.begin(), dq.end());
    }
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      const auto key = rows.Key(t, g, shape.n, attends);
      grad.dk.insert(grad.dk.end(), key.dk.begin(), key.dk.end());
      grad.dv.insert(grad.dv.end(), key.dv.begin(), key.dv.end());
    }
  }
  return grad;
}

}  // namespace sala::kernels::reference
