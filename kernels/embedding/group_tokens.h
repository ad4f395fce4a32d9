// Tokens of one id side by side, in the order they came in: a stable radix sort on the device.
// Used by the CUDA form of EmbeddingBackward.
#pragma once

#include "kernels/common/cuda.h"

namespace sala::kernels {

struct GroupedTokens {
  const int32_t* ids;        // [count], rising
  const int32_t* positions;  // [count]: where the token stood; rising within one id
};

// Scratch of the caller's scope: 4 count + 256 (ceil(count / 2048) + 1) integers. Ids in [0,
// id_limit); count at most 2^31 - 2049.
GroupedTokens GroupTokens(const Context& ctx, const Op& op, const int32_t* ids, int64_t count,
                          int64_t id_limit);

}  // namespace sala::kernels
