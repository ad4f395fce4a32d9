// An output head whose rows, the entries of the vocabulary, are cut over ranks, or end in rows that
// are no entries (padding to a round number). Shared by cross_entropy and kl_divergence.
//
// The softmax of a row of logits travels as its SoftmaxShare: kSoftmaxFields floats. The sum of
// exponentials is a float64 in two float32 (its rounding and the rest, 48 bits), the id the bits of
// an int32.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "core/elementary.h"
#include "kernels/common/exchange.h"

namespace sala::kernels {

// The weight holds rows [first_row, first_row + weight.dim(0)) of a vocabulary of `vocab`. Rows at
// and beyond `vocab` are padding: probability zero, zero gradient, never the arg-max. A rank may
// hold nothing else. Without an exchange all entries lie in this weight, from row 0.
struct VocabularyShard {
  int64_t first_row = 0;
  int64_t vocab = 0;  // 0: weight.dim(0)
  const RankExchange* exchange = nullptr;
};

// What a shard comes to for a weight of `rows` rows: its first `count` are entries.
struct ShardRows {
  int64_t first, count, vocabulary;
  // The column of an entry in this rank's logits; -1 for one of another rank.
  int64_t ColumnOf(int64_t id) const {
    return id >= first && id < first + count ? id - first : int64_t{-1};
  }
};

inline ShardRows RowsOf(const VocabularyShard& shard, int64_t rows) {
  const int64_t vocabulary = shard.vocab == 0 ? rows : shard.vocab;
  SALA_CHECK(shard.first_row >= 0 && vocabulary >= 0 && vocabulary < int64_t{1} << 31)
      << "first row " << shard.first_row << ", vocabulary " << vocabulary;
  if (shard.exchange != nullptr) {
    CheckExchange(*shard.exchange);
    SALA_CHECK(shard.vocab > 0 || shard.exchange->ranks == 1)
        << "a vocabulary that is cut over ranks needs its size";
  } else {
    SALA_CHECK(shard.first_row == 0 && vocabulary <= rows)
        << "rows [" << shard.first_row << ", " << shard.first_row + rows << ") of a vocabulary of "
        << vocabulary << " without an exchange";
  }
  const int64_t left = std::max<int64_t>(vocabulary - shard.first_row, 0);
  return {shard.first_row, std::min(rows, left), vocabulary};
}

// An id that stands for none; no entry has it.
constexpr int32_t kNoId = 0x7fffffff;

enum SoftmaxField : int { kLargestLogit, kSumHigh, kSumLow, kArgMaxBits, kSoftmaxFields };

// A float64 in two float32.
constexpr void SplitDouble(double x, float* high_low) {
  high_low[0] = static_cast<float>(x);
  high_low[1] = static_cast<float>(x - static_cast<double>(high_low[0]));
}
constexpr double JoinDouble(const float* high_low) {
  return static_cast<double>(high_low[0]) + static_cast<double>(high_low[1]);
}

// The softmax of a row, or of the part of it that one rank has.
struct SoftmaxShare {
  float largest = -std::numeric_limits<float>::infinity();
  int32_t id = kNoId;  // of the largest, the lowest on ties
  double sum = 0;      // of e^(x - largest); of e^x where the largest is minus infinity
};

inline void PutShare(const SoftmaxShare& share, float* fields) {
  fields[kLargestLogit] = share.largest;
  SplitDouble(share.sum, fields + kSumHigh);
  fields[kArgMaxBits] = std::bit_cast<float>(share.id);
}

// The whole row from the shares of all ranks, `distance` floats apart. A row with a NaN or without
// a finite value has the sum NaN.
inline SoftmaxShare JoinShares(const float* fields, int64_t ranks, int64_t distance) {
  SoftmaxShare row;
  for (int64_t k = 0; k < ranks; ++k) {
    const float largest = fields[k * distance + kLargestLogit];
    const auto id = std::bit_cast<int32_t>(fields[k * distance + kArgMaxBits]);
    if (largest > row.largest || (largest == row.largest && id < row.id)) {
      row.largest = largest;
      row.id = id;
    }
  }
  for (int64_t k = 0; k < ranks; ++k) {
    const float* share = fields + k * distance;
    row.sum +=
        JoinDouble(share + kSumHigh) *
        PortableExp(static_cast<double>(share[kLargestLogit]) - static_cast<double>(row.largest));
  }
  return row;
}

}  // namespace sala::kernels
