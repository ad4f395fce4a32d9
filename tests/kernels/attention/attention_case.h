// Inputs and outputs of one attention call, and the rounding bounds of its results.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
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

  void Dense(const Context& ctx, const std::vector<DocumentRange>& documents,
             int64_t first_query = 0) {
    AttentionForward(ctx, Wide(q), Narrow(k), Narrow(v), documents, scale(), Wide(out),
                     lse.tensor(), first_query);
    AttentionBackward(ctx, Wide(q), Narrow(k), Narrow(v), Wide(out), lse.tensor(), Wide(dout),
                      documents, scale(), Wide(dq), Narrow(dk), Narrow(dv), first_query);
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
      : shape_(shape), q_(q), k_(k) {
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

  // Of the gradients, from the double result: terms |P (dP - D)| with their parts taken absolutely.
  // One row at a time, as reference::AttentionBackwardRows.
  std::vector<double> Query(const std::vector<double>& dout, const std::vector<double>& lse,
                            int64_t t, int64_t h, const reference::Attends& attends) const {
    std::vector<double> dq(static_cast<size_t>(shape_.d));
    const double dout_sum = AbsoluteSum(dout, shape_.Query(t, h));
    for (int64_t j = 0; j <= t; ++j) {
      if (!attends(t, h / shape_.group(), j)) continue;
      const size_t key = shape_.Key(j, h / shape_.group());
      const double ds = shape_.scale * Weight(lse, t, h, j) * 2 * dout_sum * v_max_;  // |dP| + |D|
      for (size_t c = 0; c < dq.size(); ++c) {
        dq[c] += GradientFactor() * ds * std::abs(k_[key + c]);
      }
    }
    return dq;
  }
  reference::AttentionBackwardRows::KeyGradients Key(const std::vector<double>& dout,
                                                     const std::vector<double>& lse, int64_t j,
                                                     int64_t g, int64_t n,
                                                     const reference::Attends& attends) const {
    const auto d = static_cast<size_t>(shape_.d);
    reference::AttentionBackwardRows::KeyGradients bound = {std::vector<double>(d),
                                                            std::vector<double>(d)};
    for (int64_t t = j; t < n; ++t) {
      if (!attends(t, g, j)) continue;
      for (int64_t h = g * shape_.group(); h < (g + 1) * shape_.group(); ++h) {
        const size_t row = shape_.Query(t, h);
        const double p = Weight(lse, t, h, j);
        const double ds = shape_.scale * p * 2 * AbsoluteSum(dout, row) * v_max_;
        for (size_t c = 0; c < d; ++c) {
          bound.dk[c] += GradientFactor() * ds * std::abs(q_[row + c]);
          bound.dv[c] += GradientFactor() * p * std::abs(dout[row + c]);
        }
      }
    }
    return bound;
  }

 private:
  double GradientFactor() const {
    const double lse_part = weight_ + depth_ + 2 * 30;  // |lse| stays below 30 in these tests
    return (2 * lse_part + 2 * static_cast<double>(shape_.d) + 2 * weight_ + 2 * depth_) *
           kF32Round;
  }
  double Weight(const std::vector<double>& lse, int64_t t, int64_t h, int64_t j) const {
    const double* query = &q_[shape_.Query(t, h)];
    const double* key = &k_[shape_.Key(j, h / shape_.group())];
    return std::exp(shape_.scale * reference::Dot(query, key, shape_.d) -
                    lse[static_cast<size_t>(t * shape_.query_heads + h)]);
  }
  double AbsoluteSum(const std::vector<double>& x, size_t row) const {
    double sum = 0;
    for (size_t c = 0; c < static_cast<size_t>(shape_.d); ++c) sum += std::abs(x[row + c]);
    return sum;
  }
  double LongestRow(const std::vector<double>& x) const {
    double longest = 0;
    for (size_t i = 0; i + static_cast<size_t>(shape_.d) <= x.size();
         i += static_cast<size_t>(shape_.d)) {
      longest = std::max(longest, std::sqrt(reference::Dot(&x[i], &x[i], shape_.d)));
    }
    return longest;
  }

  const reference::AttentionShape shape_;
  const std::vector<double>&q_, &k_;
  double v_max_ = 0;
  double weight_ = 0;
  double depth_ = 0;
};

// One document of `n` tokens: some rows of the kernel results in `c` against the reference with the
// same keys per query. A row of causal attention does not depend on what follows, so `forward` may
// be of a longer document that begins with this one.
class RowsOfReference {
 public:
  // Of the longest document; `attends` gives the keys of each query.
  explicit RowsOfReference(const AttentionCase& c,
                           reference::Attends attends = reference::AttendsAll)
      : shape_(c.Shape()),
        q_(c.q.values()),
        k_(c.k.values()),
        v_(c.v.values()),
        dout_(c.dout.values()),
        attends_(std::move(attends)),
        forward_(reference::AttentionForward(shape_, q_, k_, v_, attends_)),
        rows_(shape_, q_, k_, v_, forward_, dout_),
        bounds_(shape_, q_, k_, v_) {}
  RowsOfReference(const RowsOfReference&) = delete;
  RowsOfReference& operator=(const RowsOfReference&) = delete;

  void ExpectQuery(const AttentionCase& c, int64_t t) const {
    for (int64_t h = 0; h < shape_.query_heads; ++h) {
      const double lse = forward_.lse[static_cast<size_t>(t * shape_.query_heads + h)];
      ASSERT_NEAR(c.lse.at(t, h), lse, bounds_.Lse(lse)) << "token " << t << " of " << c.t;
      const std::vector<double> dq = rows_.Query(t, h, attends_);
      const std::vector<double> limit = bounds_.Query(dout_, forward_.lse, t, h, attends_);
      for (int64_t i = 0; i < shape_.d; ++i) {
        const auto e = static_cast<size_t>(i);
        ASSERT_NEAR(c.out.at(t, h * shape_.d + i), forward_.out[shape_.Query(t, h) + e],
                    bounds_.Out())
            << "token " << t << " of " << c.t;
        ASSERT_NEAR(c.dq.at(t, h * shape_.d + i), dq[e], limit[e])
            << "token " << t << " of " << c.t;
      }
    }
  }

  void ExpectKey(const AttentionCase& c, int64_t j) const {
    for (int64_t g = 0; g < shape_.kv_heads; ++g) {
      const auto key = rows_.Key(j, g, c.t, attends_);
      const auto limit = bounds_.Key(dout_, forward_.lse, j, g, c.t, attends_);
      for (int64_t i = 0; i < shape_.d; ++i) {
        const auto e = static_cast<size_t>(i);
        ASSERT_NEAR(c.dk.at(j, g * shape_.d + i), key.dk[e], limit.dk[e])
            << "token " << j << " of " << c.t;
        ASSERT_NEAR(c.dv.at(j, g * shape_.d + i), key.dv[e], limit.dv[e])
            << "token " << j << " of " << c.t;
      }
    }
  }

 private:
  const reference::AttentionShape shape_;
  const std::vector<double> q_, k_, v_, dout_;
  const reference::Attends attends_;
  const reference::AttentionResult<double> forward_;
  const reference::AttentionBackwardRows rows_;
  const AttentionBounds bounds_;
};

inline void ExpectMatchesReference(const AttentionCase& c,
                                   const reference::Attends& attends = reference::AttendsAll) {
  const RowsOfReference expected(c, attends);
  for (int64_t t = 0; t < c.t; ++t) {
    expected.ExpectQuery(c, t);
    expected.ExpectKey(c, t);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

// Rows of a document of n tokens that stand for all: the borders of blocks of 64 at both ends, the
// end of a budget of 6144 tokens, and eight of an even spread with no pattern in common with them.
inline std::vector<int64_t> RowSample(int64_t n) {
  std::vector<int64_t> rows = {0,    1,    63,     64,     65,    127,  128,
                               6143, 6144, n - 65, n - 64, n - 2, n - 1};
  for (int64_t i = 0; i < 8; ++i) rows.push_back(n * i / 8 + 7 * i + 11);
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  std::erase_if(rows, [n](int64_t t) { return t < 0 || t >= n; });
  return rows;
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
