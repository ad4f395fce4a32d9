// Causal attention over blocks of keys, forward and backward: what dense and block-sparse attention
// share. Not part of the room's interface.
//
// The queries of one document and key/value head are cut into tiles of consecutive tokens; a tile
// never crosses a block of keys, so only its own block needs the causal mask. Row r of a tile is
// query head r mod G of token r / G. Each tile visits its blocks in rising order with an online
// softmax (arXiv 2205.14135). Tiles follow document-relative positions and a row's bits depend on
// nothing but its own document, so packed documents give the same bits as separate ones.
//
// A tile's blocks come with one bit per token. Only the rows of tokens whose bit is set take part;
// where all bits are set the arithmetic is the dense one, operation by operation. Hence sparse
// attention whose budget covers the past has the bits of dense attention, forward and backward,
// when the block sizes agree.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "core/context.h"
#include "kernels/common/documents.h"

namespace sala::kernels {

// A run of tokens of one document inside one block of keys.
struct QueryTile {
  DocumentRange document;
  int64_t head = 0;   // key/value head
  int64_t begin = 0;  // first token, document-relative
  int64_t count = 0;  // at most kMaxTileTokens
};

constexpr int64_t kMaxTileTokens = 64;  // one bit each

// Fills members[b], b = 0 .. begin / block_size: bit i is set when token begin + i attends to block
// b. The own block has all bits set.
using BlockMembers = std::function<void(const QueryTile& tile, std::span<uint64_t> members)>;

struct BlockAttention {
  ConstTensor q;  // f32 [Tq, N, D]
  ConstTensor k;  // f32 [T, K, D]
  ConstTensor v;  // f32 [T, K, D]
  std::span<const DocumentRange> documents;
  float scale = 1.0F;
  int64_t block_size = 64;
  BlockMembers members;     // empty: every block
  int64_t first_query = 0;  // the token of q's row 0
};

// Shapes and results as AttentionForward, AttentionBackward, AttentionDecode. Work space: k and v
// once more (backward) or k (forward), and a tile per thread.
void BlockAttentionForward(const Context& ctx, const BlockAttention& problem, const Tensor& out,
                           const Tensor& lse);
// Threads share the work by document and key/value head; each pair runs in order on one thread.
void BlockAttentionBackward(const Context& ctx, const BlockAttention& problem,
                            const ConstTensor& out, const ConstTensor& lse, const ConstTensor& dout,
                            const Tensor& dq, const Tensor& dk, const Tensor& dv);
// problem.q [1, N, D] is the token at position n - 1 of k, v [n, K, D], first_query n - 1;
// `documents` is not used. out [N, D].
void BlockAttentionDecode(const Context& ctx, const BlockAttention& problem, const Tensor& out);

// How the tokens `part` of a document, counted from its first one, are cut into tiles: calls
// tile(begin, count). The tiles are those of the whole document, or what `part` leaves of them.
void ForEachTile(const DocumentRange& part, int64_t block_size, int64_t group,
                 const std::function<void(int64_t begin, int64_t count)>& tile);
int64_t TileTokens(int64_t block_size, int64_t group);

// Calls body(i) for i in [0, n) on the pool; `worker` < threads numbers the work space to use.
void ForEachItem(const Context& ctx, int64_t n,
                 const std::function<void(int64_t worker, int64_t item)>& body);

// Aborts unless x is f32 [T, heads, D] with heads and channels contiguous.
void CheckHeads(const ConstTensor& x, int64_t tokens, int64_t heads, int64_t d);
void CheckDocuments(std::span<const DocumentRange> documents, int64_t tokens);
// Aborts unless `queries` tokens from first_query on are among `tokens` tokens.
void CheckQueries(int64_t first_query, int64_t queries, int64_t tokens);

}  // namespace sala::kernels
