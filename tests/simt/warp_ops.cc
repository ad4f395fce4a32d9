// What the warp instructions compute, once all lanes have brought their operands.
#include <bit>
#include <cstring>

#include "tests/simt/block.h"
#include "tests/simt/mma.h"

namespace simt {
namespace {

template <typename Body>
void ForLanes(unsigned mask, const Body& body) {
  for (; mask != 0; mask &= mask - 1) body(std::countr_zero(mask));
}

void SyncWarp(WarpLanes&) {}

// aux: the lane to read from.
void Shuffle(WarpLanes& lanes) {
  ForLanes(lanes.mask, [&lanes](int lane) {
    const auto source = static_cast<int>(lanes.aux[lane]);
    if ((lanes.mask >> source & 1) == 0) {
      ReportAt(current_fiber->where, "lane " + std::to_string(lane) + " shuffles from lane " +
                                         std::to_string(source) +
                                         ", which is not in the mask or has exited");
    }
    lanes.out[lane] = lanes.in[source];
  });
}

unsigned Votes(const WarpLanes& lanes) {
  unsigned votes = 0;
  ForLanes(lanes.mask, [&](int lane) { votes |= (lanes.in[lane] != 0 ? 1U : 0U) << lane; });
  return votes;
}

void ToAll(WarpLanes& lanes, uint64_t value) {
  ForLanes(lanes.mask, [&lanes, value](int lane) { lanes.out[lane] = value; });
}

void Ballot(WarpLanes& lanes) { ToAll(lanes, Votes(lanes)); }
void Any(WarpLanes& lanes) { ToAll(lanes, Votes(lanes) != 0 ? 1 : 0); }
void All(WarpLanes& lanes) { ToAll(lanes, Votes(lanes) == lanes.mask ? 1 : 0); }

void MatchAny(WarpLanes& lanes) {
  ForLanes(lanes.mask, [&lanes](int lane) {
    unsigned same = 0;
    ForLanes(lanes.mask, [&lanes, &same, lane](int other) {
      same |= (lanes.in[other] == lanes.in[lane] ? 1U : 0U) << other;
    });
    lanes.out[lane] = same;
  });
}

template <typename T, T (*kJoin)(T, T)>
void Reduce(WarpLanes& lanes) {
  auto total = static_cast<T>(lanes.in[std::countr_zero(lanes.mask)]);
  ForLanes(lanes.mask & (lanes.mask - 1),
           [&](int lane) { total = kJoin(total, static_cast<T>(lanes.in[lane])); });
  ToAll(lanes, static_cast<uint64_t>(total));
}

template <typename T>
T Plus(T a, T b) {
  return static_cast<T>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
template <typename T>
T Least(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T Greatest(T a, T b) {
  return a < b ? b : a;
}
uint32_t BitAnd(uint32_t a, uint32_t b) { return a & b; }
uint32_t BitOr(uint32_t a, uint32_t b) { return a | b; }
uint32_t BitXor(uint32_t a, uint32_t b) { return a ^ b; }

// in: a lane's MatrixRow. Row r of matrix m comes from lane 8 m + r. Lane l takes of each matrix
// elements 2 (l mod 4) and the next one of row l / 4; transposed, of column l / 4.
template <int kMatrices, bool kTrans>
void LdMatrix(WarpLanes& lanes) {
  const MatrixRow* rows[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    rows[lane] = reinterpret_cast<const MatrixRow*>(lanes.in[lane]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    uint32_t* result = rows[lane]->result;
    const int major = lane / 4;
    const int minor = lane % 4 * 2;
    for (int m = 0; m < kMatrices; ++m) {
      if (kTrans) {
        result[m] = rows[8 * m + minor]->elements[major] |
                    static_cast<uint32_t>(rows[8 * m + minor + 1]->elements[major]) << 16;
      } else {
        std::memcpy(&result[m], &rows[8 * m + major]->elements[minor], sizeof(uint32_t));
      }
    }
  }
}

}  // namespace

const WarpOp kSyncWarp{"__syncwarp", SyncWarp, false, true, true};
const WarpOp kShuffle{"__shfl_sync", Shuffle};
const WarpOp kBallot{"__ballot_sync", Ballot};
const WarpOp kAny{"__any_sync", Any};
const WarpOp kAll{"__all_sync", All};
const WarpOp kMatchAny{"__match_any_sync", MatchAny};
const WarpOp kReduceAddUnsigned{"__reduce_add_sync", Reduce<uint32_t, Plus<uint32_t>>};
const WarpOp kReduceAddSigned{"__reduce_add_sync", Reduce<int32_t, Plus<int32_t>>};
const WarpOp kReduceMinUnsigned{"__reduce_min_sync", Reduce<uint32_t, Least<uint32_t>>};
const WarpOp kReduceMinSigned{"__reduce_min_sync", Reduce<int32_t, Least<int32_t>>};
const WarpOp kReduceMaxUnsigned{"__reduce_max_sync", Reduce<uint32_t, Greatest<uint32_t>>};
const WarpOp kReduceMaxSigned{"__reduce_max_sync", Reduce<int32_t, Greatest<int32_t>>};
const WarpOp kReduceAnd{"__reduce_and_sync", Reduce<uint32_t, BitAnd>};
const WarpOp kReduceOr{"__reduce_or_sync", Reduce<uint32_t, BitOr>};
const WarpOp kReduceXor{"__reduce_xor_sync", Reduce<uint32_t, BitXor>};
const WarpOp kMmaBf16{"mma.sync", MmaBf16Warp, true};
const WarpOp kLdMatrix2{"ldmatrix.x2", LdMatrix<2, false>, true};
const WarpOp kLdMatrix2Trans{"ldmatrix.x2.trans", LdMatrix<2, true>, true};
const WarpOp kLdMatrix4{"ldmatrix.x4", LdMatrix<4, false>, true};
const WarpOp kLdMatrix4Trans{"ldmatrix.x4.trans", LdMatrix<4, true>, true};

}  // namespace simt
