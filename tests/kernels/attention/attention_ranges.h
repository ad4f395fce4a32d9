// Attention whose queries are ranges of the tokens: how tokens are cut, one range of a case, and
// the joined results of all ranges.
//
// Bounds. Rows of out, lse and dq have the bits of the uncut run. dk and dv are added over ranges
// in double and rounded to float32; they match the reference within the bounds of an uncut run,
// which allow for twice the roundings of one (AttentionBounds): ranges cost one for each of them
// and one for each tile that they cut, of which there are ten at most.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "tests/kernels/attention/attention_case.h"

namespace sala::kernels {

// The ranges between the given borders of [0, tokens), empty ones included.
inline std::vector<DocumentRange> RangesOf(std::vector<int64_t> borders, int64_t tokens) {
  borders.push_back(tokens);
  std::sort(borders.begin(), borders.end());
  std::vector<DocumentRange> ranges;
  int64_t begin = 0;
  for (const int64_t border : borders) {
    ranges.push_back({begin, border});
    begin = border;
  }
  return ranges;
}

// 1 to 5 of them. Every fifth border is a multiple of 16, every fifth that of the border before it.
inline std::vector<DocumentRange> RandomRanges(int64_t tokens, std::mt19937& rng) {
  const auto below = [&rng](int64_t n) {
    return static_cast<int64_t>(rng() % static_cast<uint64_t>(n));
  };
  std::vector<int64_t> borders;
  for (int64_t i = below(5); i > 0; --i) {
    int64_t border = below(tokens + 1);
    const int64_t kind = below(5);
    if (kind == 0) border -= border % 16;
    if (kind == 1 && !borders.empty()) border = borders.back();
    borders.push_back(border);
  }
  return RangesOf(borders, tokens);
}

// Up to `most` tokens each, every third behind a gap, until `tokens` are used.
inline std::vector<DocumentRange> RandomDocuments(int64_t tokens, int64_t most, std::mt19937& rng) {
  const auto below = [&rng](int64_t n) {
    return static_cast<int64_t>(rng() % static_cast<uint64_t>(n));
  };
  std::vector<DocumentRange> documents;
  for (int64_t t = 0; t < tokens;) {
    if (below(3) == 0) t = std::min(tokens - 1, t + below(9));
    const int64_t end = std::min(tokens, t + 1 + below(most));
    documents.push_back({t, end});
    t = end;
  }
  return documents;
}

// The queries of `range`, the keys and values of all tokens; outputs poisoned.
template <typename Case>
Case QueriesIn(const Case& c, const DocumentRange& range) {
  Case part = c;
  part.q = AttentionCase::Rows(c.q, range);
  part.dout = AttentionCase::Rows(c.dout, range);
  part.out = Matrix(range.length(), c.q.columns(), 3);
  part.lse = Matrix(range.length(), c.heads.query);
  part.dq = Matrix(range.length(), c.q.columns(), 1);
  part.dk = Matrix(c.t, c.k.columns(), 2);
  part.dv = Matrix(c.t, c.k.columns());
  return part;
}

// The results of the ranges of a case, put together.
class JoinedRanges {
 public:
  explicit JoinedRanges(const AttentionCase& c) : joined_(c) {
    joined_.Poison();
    for (auto* sum : {&dk_, &dv_}) sum->resize(static_cast<size_t>(c.k.rows() * c.k.columns()));
  }

  // Of each range: tokens of `documents` alone are written, dk and dv of them all.
  void Add(const AttentionCase& part, const DocumentRange& range,
           const std::vector<DocumentRange>& documents) {
    const std::vector<bool> used = Used(joined_.t, documents);
    for (const auto& [from, to] :
         {std::pair{&part.out, &joined_.out}, {&part.lse, &joined_.lse}, {&part.dq, &joined_.dq}}) {
      EXPECT_TRUE(from->GapsUntouched());
      for (int64_t t = 0; t < from->rows(); ++t) {
        for (int64_t i = 0; i < from->columns(); ++i) {
          const float x = from->at(t, i);
          ASSERT_EQ(std::isnan(x), !used[static_cast<size_t>(range.begin + t)]);
          to->at(range.begin + t, i) = x;
        }
      }
    }
    for (const auto& [from, to] : {std::pair{&part.dk, &dk_}, {&part.dv, &dv_}}) {
      EXPECT_TRUE(from->GapsUntouched());
      for (int64_t t = 0; t < from->rows(); ++t) {
        for (int64_t i = 0; i < from->columns(); ++i) {
          const float x = from->at(t, i);
          ASSERT_EQ(std::isnan(x), !used[static_cast<size_t>(t)]);
          (*to)[static_cast<size_t>(t * from->columns() + i)] += x;
        }
      }
    }
  }

  // NaN for tokens outside of the documents, as in an uncut run: sums of NaN.
  const AttentionCase& Results() {
    for (const auto& [from, to] : {std::pair{&dk_, &joined_.dk}, {&dv_, &joined_.dv}}) {
      for (int64_t t = 0; t < to->rows(); ++t) {
        for (int64_t i = 0; i < to->columns(); ++i) {
          to->at(t, i) = static_cast<float>((*from)[static_cast<size_t>(t * to->columns() + i)]);
        }
      }
    }
    return joined_;
  }

 private:
  AttentionCase joined_;
  std::vector<double> dk_, dv_;
};

inline void ExpectSameRows(const AttentionCase& a, const AttentionCase& b) {
  EXPECT_TRUE(a.out.SameBits(b.out)) << "out";
  EXPECT_TRUE(a.lse.SameBits(b.lse)) << "lse";
  EXPECT_TRUE(a.dq.SameBits(b.dq)) << "dq";
}

// One document of `c` as a case of its own, with its results.
template <typename Case>
Case DocumentOf(const Case& c, const AttentionCase& results, const DocumentRange& document) {
  Case piece = c;
  static_cast<AttentionCase&>(piece) = c.Piece(document);
  piece.out = AttentionCase::Rows(results.out, document);
  piece.lse = AttentionCase::Rows(results.lse, document);
  piece.dq = AttentionCase::Rows(results.dq, document);
  piece.dk = AttentionCase::Rows(results.dk, document);
  piece.dv = AttentionCase::Rows(results.dv, document);
  return piece;
}

inline std::string TextOf(const std::vector<DocumentRange>& ranges) {
  std::string text;
  for (const DocumentRange& range : ranges) {
    text += " [" + std::to_string(range.begin) + ", " + std::to_string(range.end) + ")";
  }
  return text;
}

}  // namespace sala::kernels
