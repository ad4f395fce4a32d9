// Which tokens attend to a block: the inverse of the lists of chosen blocks, and the work of the
// gradient of keys and values that follows from it. Built on the device in a fixed order: counts
// and places are integers, and each list has its tokens ascending.
#pragma once

#include <span>

#include "kernels/sparse_attention/cuda_blocks.h"

namespace sala::kernels::tile {

// A block is attended by the run of its own and the following local tokens (an initial block: all
// that follow), then by the later tokens that chose it; of both, by the queries only. Sequences of
// more than 8,192 tokens come in pieces. Everything lies in ctx.scratch: Tq * K * width integers
// for the lists, T / block * Tq / 1024 * K integers of counts, 48 bytes a tile.
KeyWork BuildKeyWork(const Context& ctx, const Op& op, std::span<const DocumentRange> documents,
                     const SparseAttentionConfig& config, const SparseShape& shape, int kv_heads,
                     const ConstTensor& blocks, int64_t first_query);

}  // namespace sala::kernels::tile
