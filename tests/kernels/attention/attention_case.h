// Inputs and outputs of one attention call, and the rounding bounds of its results.
#pragma once

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/attention/reference.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {

struct HeadCounts {
  int64_t query = 1;
  int64_t kv = 1;
  int64_t d = 16;
};

// Everything random; outputs poisoned with NaN. Rows lie further apart than they are long.
struct AttentionCase {
  AttentionCase(int64_t tokens, const HeadCounts& h, unsigned seed = 1)
      : t(tokens), heads(h), rng(seed) {
    const int64_t wide = h.query * h.d;
    const int64_t narrow = h.kv * h.d;
    q = Matrix::Random(t, wide, rng, 5);
    k = Matrix::Random(t, narrow, rng, 3);
    v = Matrix::Random(t, narrow, rng);
    dout = Matrix::Random(t, wide, rng, 7);
    Poison();
  }

  void Poison() {
    out = Matrix(t, heads.query * heads.d, 2);
    lse = Matrix(t, heads.query);
    dq = Matrix(t, heads.query * heads.d, 4);
    dk = Matrix(t, heads.kv * heads.d, 1);
    dv = Matrix(t, heads.kv * heads.d, 6);
  }

  Tensor Wide(Matrix& x) const { return x.tensor().AsHeads(heads.query, heads.d); }
  Tensor Narrow(Matrix& x) const { return x.tensor().AsHeads(heads.kv, heads.d); }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(heads.d)); }

  void Dense(const Context& ctx, const std::vector<DocumentRange>& documents) {
    AttentionForward(ctx, Wide(q), Narrow(k), Narrow(v), documents, scale(), Wide(out),
                     lse.tensor());
    AttentionBackward(ctx, Wide(q), Narrow(k), Narrow(v), Wide(out), lse.tensor(), Wide(dout),
                      documents, scale(), Wide(dq), Narrow(dk), Narrow(dv));
  }

  // Tokens [range) as a case of their own.
  AttentionCase Piece(const DocumentRange& range) const {
    AttentionCase piece(range.length(), heads);
    piece.q = Rows(q, range);
    piece.k = Rows(k, range);
    piece.v = Rows(v, range);
    piece.dout = Rows(dout, range);
    return piece;
  }
  static Matrix Rows(const Matrix& x, const DocumentRange& range) {
    Matrix rows(range.length(), x.columns());
    for (int64_t r = 0; r < rows.rows(); ++r) {
      for (int64_t c = 0; c < rows.columns(); ++c) rows.at(r, c) = x.at(range.begin + r, c);
    }
    return rows;
  }

  reference::AttentionShape Shape() const {
    return {t, heads.query, heads.kv, heads.d, static_cast<double>(scale())};
  }

  // The results in order, for bit comparisons.
  std::vector<const Matrix*> Results() const { return {&out, &lse, &dq, &dk, &dv}; }

  int64_t t;
  HeadCounts heads;
  std::mt19937 rng;
  Matrix q{0, 1}, k{0, 1}, v{0, 1}, dout{0, 1}, out{0, 1}, lse{0, 1}, dq{0, 1}, dk{0, 1}, dv{0, 1};
};

inline void ExpectSameResults(const AttentionCase& a, const AttentionCase& b) {
  const char* const names[] = {"out", "lse", "dq", "dk", "dv"};
  for (size_t i = 0; i < a.Results().size(); ++i) {
    EXPECT_TRUE(a.Results()[i]->SameBits(*b.Results()[i])) << names[i];
  }
}

// Worst-case first-order rounding bounds (Higham, Accuracy and Stability, ch. 3): an error is at
// most the number of roundings on the longest path, times 2^-24, times the sum of the absolute
// values of the terms.
class AttentionBounds {
 public:
  AttentionBounds(const reference::AttentionShape& shape, const std::vector<double>& q,
                  const std::vector<double>& k, const std::vector<double>& v)
      : shape_(shape), q_(q), k_(k), v_(v) {
    for (double x : v) v_max_ = std::max(v_max_, std::abs(x));
    const double score = shape.scale * LongestRow(q) * LongestRow(k);
    const auto d = static_cast<double>(shape.d);
    // Products of a score, its scaling, the subtraction of the maximum (twice as large at most),
    // exp at 2 units in the last place = 4 roundings.
    weight_ = (d + 1) * score + 2 * score + 4;
    // Sums over keys: 64 within a block (256 rows of a tile for dk, dv), then one per block or
    // tile, at least 16 tokens each, with two rescalings.
    depth_ = 256 + 3 * (static_cast<double>(shape.n) / 16 + 1);
  }

  double OutFactor() const { return (2 * weight_ + depth_) * kF32Round; }
  double Out() const { return OutFactor() * v_max_; }
  double Lse(double lse) const { return (weight_ + depth_ + 2 * std::abs(lse)) * kF32Round; }

  // Per element, from the double result: terms |P (dP - D)| with their parts taken absolutely.
  reference::AttentionGradients Gradients(const std::vector<double>& dout,
                                          const std::vector<double>& lse,
                                          const reference::Attends& attends) const {
    const auto d = static_cast<size_t>(shape_.d);
    reference::AttentionGradients bound = {std::vector<double>(q_.size()),
                                           std::vector<double>(k_.size()),
                                           std::vector<double>(v_.size())};
    const double lse_part = weight_ + depth_ + 2 * 30;  // |lse| stays below 30 in these tests
    const double factor =
        (2 * lse_part + 2 * static_cast<double>(d) + 2 * weight_ + 2 * depth_) * kF32Round;
    for (int64_t t = 0; t < shape_.n; ++t) {
      for (int64_t h = 0; h < shape_.query_heads; ++h) {
        const int64_t g = h / shape_.group();
        const size_t row = shape_.Query(t, h);
        double dout_sum = 0;
        for (size_t c = 0; c < d; ++c) dout_sum += std::abs(dout[row + c]);
        for (int64_t j = 0; j <= t; ++j) {
          if (!attends(t, g, j)) continue;
          const size_t key = shape_.Key(j, g);
          const double p = std::exp(shape_.scale * reference::Dot(&q_[row], &k_[key], shape_.d) -
                                    lse[static_cast<size_t>(t * shape_.query_heads + h)]);
          const double ds = shape_.scale * p * 2 * dout_sum * v_max_;  // |dP| + |D|
          for (size_t c = 0; c < d; ++c) {
            bound.dq[row + c] += factor * ds * std::abs(k_[key + c]);
            bound.dk[key + c] += factor * ds * std::abs(q_[row + c]);
            bound.dv[key + c] += factor * p * std::abs(dout[row + c]);
          }
        }
      }
    }
    return bound;
  }

 private:
  double LongestRow(const std::vector<double>& x) const {
    double longest = 0;
    for (size_t i = 0; i + static_cast<size_t>(shape_.d) <= x.size();
         i += static_cast<size_t>(shape_.d)) {
      longest = std::max(longest, std::sqrt(reference::Dot(&x[i], &x[i], shape_.d)));
    }
    return longest;
  }

  const reference::AttentionShape shape_;
  const std::vector<double>&q_, &k_, &v_;
  double v_max_ = 0;
  double weight_ = 0;
  double depth_ = 0;
};

// One document: kernel results in `c` against the reference with the same keys per query.
inline void ExpectMatchesReference(const AttentionCase& c,
                                   const reference::Attends& attends = reference::AttendsAll) {
  const reference::AttentionShape shape = c.Shape();
  const auto q = c.q.values();
  const auto k = c.k.values();
  const auto v = c.v.values();
  const auto dout = c.dout.values();
  const AttentionBounds bounds(shape, q, k, v);
  const auto forward = reference::AttentionForward(shape, q, k, v, attends);
  ExpectClose(c.out, forward.out, [&](size_t) { return bounds.Out(); });
  ExpectClose(c.lse, forward.lse, [&](size_t i) { return bounds.Lse(forward.lse[i]); });
  const auto grad = reference::AttentionBackward(shape, q, k, v, dout, attends);
  const auto limit = bounds.Gradients(dout, forward.lse, attends);
  ExpectClose(c.dq, grad.dq, [&](size_t i) { return limit.dq[i]; });
  ExpectClose(c.dk, grad.dk, [&](size_t i) { return limit.dk[i]; });
  ExpectClose(c.dv, grad.dv, [&](size_t i) { return limit.dv[i]; });
}

// Which tokens lie in a document.
inline std::vector<bool> Used(int64_t tokens, const std::vector<DocumentRange>& documents) {
  std::vector<bool> used(static_cast<size_t>(tokens));
  for (const DocumentRange& document : documents) {
    for (int64_t t = document.begin; t < document.end; ++t) used[static_cast<size_t>(t)] = true;
  }
  return used;
}

// NaN in the inputs of all other tokens.
inline void PoisonUnused(AttentionCase& c, const std::vector<bool>& used) {
  for (Matrix* x : {&c.q, &c.k, &c.v, &c.dout}) {
    for (int64_t t = 0; t < c.t; ++t) {
      for (int64_t i = 0; i < x->columns() && !used[static_cast<size_t>(t)]; ++i) {
        x->at(t, i) = std::numeric_limits<float>::quiet_NaN();
      }
    }
  }
}

// Used tokens have finite results, the others still hold the NaN from before.
inline void ExpectOnlyUsedWritten(const AttentionCase& c, const std::vector<bool>& used) {
  for (const Matrix* x : c.Results()) {
    for (int64_t t = 0; t < c.t; ++t) {
      for (int64_t i = 0; i < x->columns(); ++i) {
        ASSERT_EQ(std::isnan(x->at(t, i)), !used[static_cast<size_t>(t)]) << t << ", " << i;
      }
    }
  }
}

// Documents of the given lengths one after the other, `gap` unused tokens before each.
inline std::vector<DocumentRange> DocumentsOf(const std::vector<int64_t>& lengths,
                                              int64_t gap = 0) {
  std::vector<DocumentRange> documents;
  int64_t t = 0;
  for (int64_t length : lengths) {
    documents.push_back({t + gap, t + gap + length});
    t += gap + length;
  }
  return documents;
}

}  // namespace sala::kernels
