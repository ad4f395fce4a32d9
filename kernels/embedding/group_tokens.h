// Tokens of one row of a table side by side, in the order they came in: a stable radix sort on the
// device. Used by the CUDA form of EmbeddingBackward.
#pragma once

#include "kernels/common/cuda.h"

namespace sala::kernels {

// Which of the ids are rows of this part of a table, and which row they are.
struct TableRows {
  int32_t first, count;
  // The row of an id; `count` for an id outside. A row stays what it is where first is 0.
  // Together first and count are at most 2^31 - 1, so a negative id lies beyond them as well.
  __device__ __forceinline__ int32_t RowOf(int32_t id) const {
    const uint32_t row = static_cast<uint32_t>(id) - static_cast<uint32_t>(first);
    return row < static_cast<uint32_t>(count) ? static_cast<int32_t>(row) : count;
  }
};

struct GroupedTokens {
  const int32_t* rows;       // [count], rising; those of ids outside come last
  const int32_t* positions;  // [count]: where the token stood; rising within one row
};

// Scratch of the caller's scope: 4 count + 256 (ceil(count / 2048) + 1) integers. `count` at most
// 2^31 - 2049.
GroupedTokens GroupTokens(const Context& ctx, const Op& op, const int32_t* ids, int64_t count,
                          const TableRows& table);

}  // namespace sala::kernels
